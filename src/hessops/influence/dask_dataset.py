"""torch_dataset_to_dask_array: the items of a dataset as lazy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from hessops.errors import ArgumentError, ArgumentTypeError, DataError, DtypeError, ShapeError
from hessops.influence.converter import NumpyArray, TorchNumpyConverter
from hessops.influence.dask_graphs import DaskArray, Key, graph_of, imported, lazy_array
from hessops.influence.dask_points import KINDS_OF_NUMBERS
from hessops.streaming import known_length
from hessops.validation import checked_count

if TYPE_CHECKING:
    from numpy.typing import DTypeLike


@dataclass(frozen=True)
class Entry:
    """What an entry of every item is.

    Attributes:
        shape: Of the entry of one item.
        dtype: Of its numbers.
        cast: Whether they are converted, or must have that dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    cast: bool


def torch_dataset_to_dask_array(
    dataset: Dataset[Any],
    chunk_size: int,
    total_size: int | None = None,
    resulting_dtype: DTypeLike | None = None,
) -> tuple[DaskArray, ...]:
    """The items of a dataset as dask arrays, one for each entry of an item.

    Item 0 is read at once, for shapes and dtypes; all others when their chunk is computed, together
    for all entries. The dataset is pickled once, and sent to the workers that read it. Numbers keep
    their dtype, labels too: cross-entropy needs them as int64.

    Args:
        dataset: Has ``dataset[i]``, a number, tensor or array, or a tuple of them: the same number
            of entries, shapes and dtypes for every i.
        chunk_size: Points in a chunk; the last one may have fewer.
        total_size: Number of points N, for datasets without a length; otherwise the first ones that
            are taken.
        resulting_dtype: What numbers of all entries are converted to; ``None`` converts nothing.

    Returns:
        Arrays ``(N, *shape)`` in chunks along the points.

    Raises:
        ArgumentTypeError: `dataset` is iterable only, an argument is something else, or an entry
            of an item is.
        ArgumentError: `total_size` is needed, or larger than the dataset.
        DataError: There are no points. In computations: fewer of them than `total_size`, or an
            item with another number of entries.
        DtypeError: An entry that has no numbers. In computations: one of another dtype.
        ShapeError: In computations, an item of another shape.
        ImportError: dask or distributed is not installed.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from hessops.influence import torch_dataset_to_dask_array
        >>> dataset = TensorDataset(torch.randn(5, 3), torch.arange(5))
        >>> x, y = torch_dataset_to_dask_array(dataset, chunk_size=2)
        >>> x.chunks, y.dtype
        (((2, 2, 1), (3,)), dtype('int64'))
    """
    imported("dask.array")
    chunk_size = checked_count(chunk_size, "chunk_size")
    total = _number_of_points(dataset, total_size)
    entries = tuple(_entry_of(part, resulting_dtype) for part in _parts(dataset[0], 0))
    return _arrays(dataset, entries, _chunk_sizes(total, chunk_size))


def _arrays(
    dataset: Dataset[Any], entries: tuple[Entry, ...], sizes: tuple[int, ...]
) -> tuple[DaskArray, ...]:
    # As a task of its own, so that the graph holds it once.
    source = imported("dask.delayed").delayed(dataset, traverse=False, pure=False)
    name = f"points-{source.key}"
    starts = np.cumsum([0, *sizes])
    read: dict[Key, object] = {
        f"{name}-{i}": (read_points, source.key, entries, int(starts[i]), int(starts[i + 1]))
        for i in range(len(sizes))
    }
    first, graph = next(iter(read)), graph_of(name, read, [source])
    points = imported("dask.delayed").Delayed(first, graph, layer=name)
    arrays = []
    for e, entry in enumerate(entries):
        own = f"entry-{e}-{name}"
        tasks: dict[Key, object] = {
            (own, i, *[0] * len(entry.shape)): (entry_of_points, key, e)
            for i, key in enumerate(read)
        }
        chunks = (sizes, *((size,) for size in entry.shape))
        arrays.append(lazy_array(own, tasks, [points], chunks, entry.dtype))
    return tuple(arrays)


def _number_of_points(dataset: object, total_size: int | None) -> int:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise ArgumentTypeError(
            f"dataset must have items by their position, dataset[i], got {type(dataset).__name__}: "
            "collect the points of an iterable one in a TensorDataset"
        )
    length = known_length(dataset)
    if total_size is None:
        if length is None:
            raise ArgumentError(
                f"total_size is needed: {type(dataset).__name__} has no length; pass the number of "
                "its points"
            )
        total = length
    else:
        total = checked_count(total_size, "total_size")
        if length is not None and total > length:
            raise ArgumentError(f"total_size is {total}, but dataset has {length} points")
    if total == 0:
        raise DataError("dataset is empty")
    return total


def _chunk_sizes(total: int, chunk_size: int) -> tuple[int, ...]:
    whole, rest = divmod(total, chunk_size)
    return (chunk_size,) * whole + ((rest,) if rest else ())


def _parts(item: object, index: int) -> list[NumpyArray]:
    """The entries of an item as arrays."""
    entries = item if isinstance(item, (tuple, list)) else (item,)
    if not entries:
        raise DataError(f"item {index} of dataset has no entries")
    return [_array_of(entry, index, place) for place, entry in enumerate(entries)]


def _array_of(entry: object, index: int, place: int) -> NumpyArray:
    if isinstance(entry, Tensor):
        return TorchNumpyConverter().to_numpy(entry)
    if isinstance(entry, (bool, int, float, complex, np.ndarray, np.generic)):
        return np.asarray(entry)
    raise ArgumentTypeError(
        f"entry {place} of item {index} of dataset must be a tensor, array or number, got "
        f"{type(entry).__name__}"
    )


def _entry_of(part: NumpyArray, resulting_dtype: DTypeLike | None) -> Entry:
    if resulting_dtype is None:
        dtype, cast = part.dtype, False
    else:
        try:
            dtype, cast = np.dtype(resulting_dtype), True
        except TypeError as error:
            raise ArgumentTypeError(
                f"resulting_dtype must be a numpy dtype or its name, got {resulting_dtype!r}"
            ) from error
    if dtype.kind not in KINDS_OF_NUMBERS:
        raise DtypeError(f"an entry of dataset has the dtype {dtype}, expected numbers")
    return Entry(part.shape, dtype, cast)


def read_points(
    dataset: Dataset[Any], entries: tuple[Entry, ...], start: int, stop: int
) -> tuple[NumpyArray, ...]:
    """The points from `start` to `stop`, an array for each entry; a task."""
    chunk = tuple(np.empty((stop - start, *e.shape), dtype=e.dtype) for e in entries)
    for index in range(start, stop):
        try:
            item = dataset[index]
        except IndexError as error:
            raise DataError(
                f"dataset has no item {index}: pass total_size=, the number of its points"
            ) from error
        parts = _parts(item, index)
        if len(parts) != len(entries):
            raise DataError(
                f"item {index} of dataset has {len(parts)} entries, item 0 has {len(entries)}"
            )
        for place, (part, entry) in enumerate(zip(parts, entries, strict=True)):
            _require_like(entry, part, f"entry {place} of item {index} of dataset")
            chunk[place][index - start] = part
    return chunk


def _require_like(entry: Entry, part: NumpyArray, name: str) -> None:
    if part.shape != entry.shape:
        raise ShapeError(
            f"{name} has shape {part.shape}, that of item 0 has {entry.shape}: arrays need one "
            "shape; pad or resize them in the dataset"
        )
    if not entry.cast and part.dtype != entry.dtype:
        raise DtypeError(
            f"{name} is {part.dtype}, that of item 0 is {entry.dtype}: pass resulting_dtype="
        )


def entry_of_points(points: tuple[NumpyArray, ...], place: int) -> NumpyArray:
    """An entry of the points of a chunk; a task."""
    return points[place]
