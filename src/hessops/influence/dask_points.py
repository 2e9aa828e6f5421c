"""ChunkedPoints: inputs and targets as dask arrays that are chunked along the points."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan

from hessops.errors import ArgumentTypeError, DataError, DtypeError, ShapeError
from hessops.influence.dask_graphs import DaskArray, Key, imported, row_key

# Booleans, integers, floating-point and complex numbers.
KINDS_OF_NUMBERS = "biufc"


@dataclass(frozen=True, eq=False)
class ChunkedPoints:
    """n points in chunks.

    Attributes:
        x: Inputs, ``(n, ...)``, chunked along the first dimension only.
        y: Targets, ``(n, ...)``, in the same chunks.
    """

    x: DaskArray
    y: DaskArray

    @classmethod
    def of(cls, x: object, y: object, x_name: str = "x", y_name: str = "y") -> ChunkedPoints:
        """Inputs and targets, checked.

        Raises:
            ArgumentTypeError, ShapeError, DataError, DtypeError: As of `checked_by_rows`.
            ShapeError: `x` and `y` have other numbers of points, or other chunks.
        """
        inputs = checked_by_rows(x, x_name)
        targets = checked_by_rows(y, y_name)
        if inputs.shape[0] != targets.shape[0]:
            raise ShapeError(
                f"{x_name} has {inputs.shape[0]} points and {y_name} has {targets.shape[0]}"
            )
        if inputs.chunks[0] != targets.chunks[0]:
            raise ShapeError(
                f"{x_name} and {y_name} have other chunks along the points, "
                f"{_short(inputs.chunks[0])} and {_short(targets.chunks[0])}: use "
                f"{y_name}.rechunk({{0: {x_name}.chunks[0]}})"
            )
        return cls(inputs, targets)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Points by chunk."""
        return tuple(int(size) for size in self.x.chunks[0])

    def keys(self, position: int) -> tuple[Key, Key]:
        """The chunks of inputs and targets at a position."""
        return row_key(self.x, position), row_key(self.y, position)


def checked_by_rows(array: object, name: str) -> DaskArray:
    """A dask array of numbers that is chunked along its first dimension only.

    Raises:
        ArgumentTypeError: No dask array.
        ShapeError: No dimension, chunks of unknown size, or chunks along another dimension.
        DataError: A chunk without points.
        DtypeError: No numbers.
    """
    if not isinstance(array, imported("dask.array").Array):
        raise ArgumentTypeError(
            f"{name} must be a dask array, got {type(array).__name__}; see dask.array.from_array "
            "and torch_dataset_to_dask_array"
        )
    if array.ndim == 0:
        raise ShapeError(f"{name} has no dimension, expected (n, ...), a row for each point")
    if any(isnan(size) for sizes in array.chunks for size in sizes):
        raise ShapeError(
            f"{name} has chunks of unknown size: call {name}.compute_chunk_sizes() first"
        )
    for dimension, sizes in enumerate(array.chunks[1:], start=1):
        if len(sizes) != 1:
            raise ShapeError(
                f"{name} is chunked along dimension {dimension}, {_short(sizes)}, expected chunks "
                f"along the points only: use {name}.rechunk({{{dimension}: -1}})"
            )
    if 0 in array.chunks[0]:
        raise DataError(
            f"{name} has chunks without points, {_short(array.chunks[0])}: leave them out, or use "
            f"{name}.rechunk({{0: ...}}) with a positive size"
        )
    if array.dtype.kind not in KINDS_OF_NUMBERS:
        raise DtypeError(
            f"{name} has the dtype {array.dtype}, expected numbers: use {name}.astype(...)"
        )
    return array


def _short(sizes: tuple[int, ...], most: int = 6) -> str:
    shown = ", ".join(str(size) for size in sizes[:most])
    return f"({shown}, ...)" if len(sizes) > most else f"({shown})"
