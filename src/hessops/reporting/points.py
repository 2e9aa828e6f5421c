"""Points that are shown: read one by one, and described."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessops.errors import ArgumentTypeError, ShapeError
from hessops.reporting.images import Bytes, Floats, as_image

# Of inputs and targets, whose types are the user's.
Describe = Callable[[Any, Any], object]
Picture = Callable[[Any], object]


class Points:
    """A collection of which single points are read.

    Args:
        points: A pair ``(x, y)`` of arrays or sequences, where y may be ``None``; or a map-style
            dataset whose items are such pairs for one point.
        size: How many there must be.
        name: The argument, for messages.

    Raises:
        ArgumentTypeError: `points` is something else.
        ShapeError: There are more or fewer points.
    """

    def __init__(self, points: object, size: int, name: str) -> None:
        self._points, self._name = points, name
        parts = points if isinstance(points, tuple) else (points,)
        if isinstance(points, tuple) and len(points) != 2:
            raise ArgumentTypeError(f"{name} must be a pair (x, y), got {len(points)} items")
        for part in parts:
            if part is None and isinstance(points, tuple) and part is not points[0]:
                continue
            found = self._length_of(part)
            if found != size:
                raise ShapeError(
                    f"{name} has {found} points, scores are of {size}: give the points of the "
                    "scores in their order"
                )

    def _length_of(self, part: object) -> int:
        if isinstance(part, torch.utils.data.DataLoader):
            raise ArgumentTypeError(
                f"{self._name} is a DataLoader, which has batches: pass its dataset"
            )
        if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
            raise ArgumentTypeError(
                f"{self._name} must be a pair of arrays (x, y) or a dataset with a length, got "
                f"{type(part).__name__}"
            )
        return len(part)

    def read(self, index: int) -> tuple[object, object]:
        """The input and the target of a point.

        Raises:
            ArgumentTypeError: An item of the dataset is no pair.
        """
        if isinstance(self._points, tuple):
            x, y = self._points
            return x[index], None if y is None else y[index]
        item = self._points[index]  # type: ignore[index]  # it has items, as checked
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise ArgumentTypeError(
                f"{self._name}[{index}] must be a pair (x, y), got {type(item).__name__}"
            )
        return item[0], item[1]


@dataclass(frozen=True)
class Shown:
    """A point of the page.

    Attributes:
        index: Its position in its collection.
        label: What it is.
        image: Its image, where images are shown.
        features: Its numbers, where its input is a row of a table.
        text: Its input in words, where it is neither.
    """

    index: int
    label: str = ""
    image: Floats | Bytes | None = None
    features: tuple[float, ...] | None = None
    text: str | None = None


@dataclass(frozen=True)
class Reader:
    """How points are read and described.

    Attributes:
        points: The collection; ``None`` shows positions alone.
        name: What a point of it is called.
        describe: From input and target to words.
        picture: From input to an image; ``None`` shows none.
    """

    points: Points | None
    name: str
    describe: Describe | None
    picture: Picture | None

    def shown(self, index: int) -> Shown:
        """A point for the page.

        Raises:
            ShapeError, NonFiniteError: Its image is none.
        """
        if self.points is None:
            return Shown(index)
        x, y = self.points.read(index)
        label = described(y) if self.describe is None else str(self.describe(x, y))
        if self.picture is not None:
            image = as_image(self.picture(x), f"the image of {self.name} {index}")
            return Shown(index, label, image=image)
        features = features_of(x)
        if features is not None:
            return Shown(index, label, features=features)
        return Shown(index, label, text=x if isinstance(x, str) else in_words(x))


def described(y: object) -> str:
    """A target in words."""
    if y is None:
        return ""
    return y if isinstance(y, str) else f"target {in_words(y)}"


def in_words(value: object) -> str:
    """A value in a few words."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        if not value.shape:
            return _scalar(value.item())
        kind = str(value.dtype).removeprefix("torch.")
        return f"of shape {tuple(value.shape)}, {kind}"
    return _scalar(value)


def _scalar(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def features_of(x: object) -> tuple[float, ...] | None:
    """The numbers of a row of a table; ``None`` for any other input."""
    if isinstance(x, Tensor):
        if x.ndim > 1 or x.is_complex():
            return None
        return tuple(float(value) for value in x.reshape(-1).tolist())
    if isinstance(x, (np.ndarray, np.generic)):
        if x.ndim > 1 or x.dtype.kind not in "biuf":
            return None
        return tuple(float(value) for value in x.reshape(-1).tolist())
    if isinstance(x, Sequence) and not isinstance(x, str):
        is_row = len(x) > 0 and all(isinstance(value, (int, float)) for value in x)
        return tuple(map(float, x)) if is_row else None
    return (float(x),) if isinstance(x, (int, float)) else None
