"""Checks of what is to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hessops.errors import ArgumentTypeError, DtypeError, NonFiniteError, ShapeError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Numbers = Tensor | NDArray[np.generic] | Sequence[float]
Labels = Tensor | NDArray[np.generic] | Sequence[object]


def checked_numbers(values: object, name: str, *, ndim: int) -> Floats:
    """Finite real numbers in `ndim` dimensions, in float64 and in host memory.

    Raises:
        ArgumentTypeError, DtypeError: Not numbers, or complex ones.
        ShapeError: Another number of dimensions, or no entries.
        NonFiniteError: NaN or infinity.
    """
    array = as_array(values, name)
    if array.dtype.kind not in "iuf":
        raise DtypeError(f"{name} must hold real numbers, got {array.dtype}")
    if array.ndim != ndim:
        raise ShapeError(f"{name} must have {ndim} dimension(s), got shape {array.shape}")
    if not array.size:
        raise ShapeError(f"{name} has shape {array.shape}: there is nothing to draw")
    numbers = array.astype(np.float64)
    bad = int((~np.isfinite(numbers)).sum())
    if bad:
        raise NonFiniteError(
            f"{name} holds {bad} NaN or infinite value(s) of {numbers.size}; find out why, or "
            "leave them out, before it is drawn"
        )
    return numbers


def as_array(values: object, name: str) -> NDArray[np.generic]:
    """Anything that holds numbers or labels, as a numpy array."""
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
        # numpy has no bfloat16, and float64 holds every float there is.
        return np.asarray(tensor.double() if tensor.is_floating_point() else tensor)
    if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        raise ArgumentTypeError(
            f"{name} must be a tensor, an array or a sequence, got {type(values).__name__}"
        )
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ShapeError(f"{name} is ragged: {error}") from error


def checked_labels(labels: object, count: int, name: str) -> list[object]:
    """One label for each of `count` things.

    Raises:
        ArgumentTypeError: Not a one-dimensional tensor, array or sequence.
        ShapeError: Another number of labels.
    """
    if isinstance(labels, Tensor | np.ndarray):
        labels = as_array(labels, name).tolist()
    if isinstance(labels, str | bytes) or not isinstance(labels, Sequence):
        raise ArgumentTypeError(
            f"{name} must be a tensor, an array or a sequence of labels, got "
            f"{type(labels).__name__}"
        )
    if len(labels) != count or any(isinstance(label, list) for label in labels):
        raise ShapeError(f"{name} must hold {count} labels, one each, got {len(labels)}")
    return list(labels)


def checked_pair_of_names(names: object, name: str) -> tuple[str, str]:
    """Two strings."""
    if (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or len(names) != 2
        or not all(isinstance(one, str) for one in names)
    ):
        raise ArgumentTypeError(f"{name} must be two strings, got {names!r}")
    return names[0], names[1]


def label_order(labels: list[object]) -> list[object]:
    """The different labels: numbers by size, anything else by its text."""
    different = list(dict.fromkeys(labels))
    if all(isinstance(label, Real) for label in different):
        return sorted(different, key=lambda label: float(label))  # type: ignore[arg-type]  # just checked
    return sorted(different, key=str)
