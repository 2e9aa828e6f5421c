"""What is refused before anything is read or written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hessops.errors import ArgumentError, ArgumentTypeError, ParameterNameError, ShapeError
from hessops.influence.model import InfluenceFunctionModel
from hessops.operators.solution import Solution
from hessops.reporting.points import Picture
from hessops.validation import checked_count


def checked_path(path: object) -> Path:
    """A path that a file can be written to.

    Raises:
        ArgumentTypeError: It is no path.
        FileNotFoundError, IsADirectoryError: Its directory is missing, or it is one.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError(f"path must be a path, got {type(path).__name__}")
    found = Path(path)
    if found.is_dir():
        raise IsADirectoryError(f"path is a directory, {found}: name a file in it")
    if not found.parent.is_dir():
        raise FileNotFoundError(f"the directory of path does not exist: {found.parent}")
    return found


def require_model(model: object) -> None:
    """Raises `ArgumentTypeError` or `NotFittedError` for anything but a fitted model."""
    if not isinstance(model, InfluenceFunctionModel):
        raise ArgumentTypeError(
            f"model must be an InfluenceFunctionModel, got {type(model).__name__}; the network "
            "is in it"
        )
    _ = model.fitted


def checked_solutions(
    solutions: object, model: InfluenceFunctionModel | None, m: int
) -> dict[str, Solution]:
    """Block -> outcomes; without a name where there is one block.

    Raises:
        ArgumentTypeError: Something else than solutions.
        ArgumentError: An empty mapping.
        ShapeError: Other numbers of right-hand sides or of parameters.
        ParameterNameError: Other blocks than those of the model.
    """
    if solutions is None:
        return {}
    given = dict(solutions) if isinstance(solutions, Mapping) else {"": solutions}
    if not given:
        raise ArgumentError("solutions is an empty mapping: give one for each block, or None")
    named: dict[str, Solution] = {}
    for name, one in given.items():
        which = f"solutions[{name!r}]" if name else "solutions"
        if not isinstance(one, Solution):
            raise ArgumentTypeError(f"{which} must be a Solution, got {type(one).__name__}")
        named[str(name)] = one
        if len(one.status) != m:
            raise ShapeError(
                f"{which} has {len(one.status)} right-hand sides, scores are of {m} test points: "
                "there must be one for each"
            )
    if model is not None:
        _require_blocks(named, model)
    if len(named) == 1:
        return {"": next(iter(named.values()))}
    return named


def _require_blocks(solutions: Mapping[str, Solution], model: InfluenceFunctionModel) -> None:
    sizes = {name: block.space.size for name, block in model.fitted.blocks.items()}
    if set(solutions) == {""}:  # as of the joint inverse
        sizes = {"": model.space.size}
    if set(solutions) != set(sizes):
        raise ParameterNameError(
            f"solutions has the blocks {list(solutions)}, the model {list(sizes)}"
        )
    for name, size in sizes.items():
        found = solutions[name].value.shape[-1]
        if found != size:
            raise ShapeError(
                f"solutions are of {found} parameters{f' in block {name!r}' if name else ''}, the "
                f"model has {size}"
            )


def checked_picture(images: object) -> Picture | None:
    """A function from an input to an image, or ``None``.

    Raises:
        ArgumentTypeError: Something else than a boolean or a function.
    """
    if isinstance(images, bool):
        return _itself if images else None
    if not callable(images):
        raise ArgumentTypeError(
            "images must be True, False or a function from an input to an image, got "
            f"{type(images).__name__}"
        )
    return images


def _itself(x: object) -> object:
    return x


def checked_points(test_points: object, m: int) -> list[int]:
    """Which test points have examples.

    Raises:
        ArgumentTypeError: No integers.
        ArgumentError: A negative number, a point that there is not, or one twice.
    """
    if isinstance(test_points, int):
        return list(range(min(checked_count(test_points, "test_points", minimum=0), m)))
    if isinstance(test_points, str) or not isinstance(test_points, Iterable):
        raise ArgumentTypeError(
            f"test_points must be a number or a list of positions, got {test_points!r}"
        )
    chosen = [int(p) if hasattr(p, "__index__") else p for p in test_points]
    for point in chosen:
        if checked_count(point, "test_points", minimum=0) >= m:
            raise ArgumentError(f"test_points names point {point}, scores are of {m}")
    if len(set(chosen)) < len(chosen):
        raise ArgumentError(f"test_points names a point twice: {chosen}")
    return chosen


def require_names(names: object, features: Iterable[tuple[float, ...] | None]) -> None:
    """Raises `ArgumentTypeError` or `ShapeError` for names that are not of all features."""
    if names is None:
        return
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ArgumentTypeError(f"feature_names must be a list of names, got {names!r}")
    for row in features:
        if row is not None and len(row) != len(names):
            raise ShapeError(
                f"feature_names has {len(names)} names, an input that is shown has {len(row)} "
                "features"
            )
