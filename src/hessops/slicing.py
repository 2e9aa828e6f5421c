"""Loaders over tensors that index a whole batch at once, in place of point by point."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map
from torch.utils.data.distributed import DistributedSampler

# Samplers that draw from generators of torch and from no others.
_SAMPLERS_OF_TORCH = (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
_Positions = NDArray[np.int64]
_Indices = Sequence[int] | _Positions | Tensor


def sliced(data: Iterable[object]) -> Iterable[object]:
    """The same batches by one index into the tensors, where that is known to be the same.

    A `torch.utils.data.DataLoader` reads a dataset of tensors point by point and stacks the points
    again, at some 10 µs a point. The loader returned here runs the same samplers in the same
    iterator, so that order, random draws and what is dropped are the loader's own; only the points
    of a batch are read together, which gives the same bits. Batches are copies, as the loader's.

    Args:
        data: Any iterable of batches. It is given back as it is unless it is known through and
            through: a `torch.utils.data.DataLoader` without workers and with torch's own collation
            over a `torch.utils.data.TensorDataset`, or over a `torch.utils.data.Subset` or
            `torch.utils.data.StackDataset` of such. A subclass may read its points in another way.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from hessops.slicing import sliced
        >>> loader = DataLoader(TensorDataset(torch.arange(5.0)), batch_size=2)
        >>> [batch.tolist() for (batch,) in sliced(loader)]
        [[0.0, 1.0], [2.0, 3.0], [4.0]]
    """
    if not _is_plain(data):
        return data
    loader = copy.copy(data)
    # A loader refuses to be given another dataset, as its samplers have the length of the first.
    vars(loader)["dataset"] = _Sliced(data.dataset)
    loader.collate_fn = _as_it_is
    return loader


def draws_from_torch_only(data: Iterable[object]) -> bool:
    """Whether iterating what `sliced` gave is known to draw from no generator but torch's.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from hessops.slicing import draws_from_torch_only, sliced
        >>> draws_from_torch_only(sliced(DataLoader(TensorDataset(torch.ones(4, 2)))))
        True
    """
    if type(data) in (list, tuple):
        return True
    if not isinstance(data, DataLoader) or not isinstance(data.dataset, _Sliced):
        return False
    batches = data.batch_sampler
    return type(batches) is BatchSampler and type(batches.sampler) in _SAMPLERS_OF_TORCH


def _is_plain(data: object) -> TypeGuard[DataLoader[object]]:
    return (
        type(data) is DataLoader
        and data.num_workers == 0
        and data.batch_sampler is not None
        and data.collate_fn is default_collate
        and _stacks_tensors()
        and _is_readable(data.dataset)
    )


def _stacks_tensors() -> bool:
    """Whether torch's table of collations, which anyone may extend, still treats tensors so."""
    others = [known for known in default_collate_fn_map if known is not Tensor]
    return default_collate_fn_map.get(Tensor) is collate_tensor_fn and not any(
        issubclass(tuple, known) or issubclass(dict, known) for known in others
    )


def _is_readable(source: object) -> bool:
    if type(source) is Tensor:
        return _is_stacked_contiguously(source)
    if type(source) is TensorDataset:
        tensors = source.tensors
        is_whole = type(tensors) is tuple and not hasattr(source, "__getitems__")
        return is_whole and all(type(t) is Tensor and _is_readable(t) for t in tensors)
    # A loader asks the dataset for this method, and so finds one of a single object.
    if "__getitems__" in getattr(source, "__dict__", {}):
        return False
    if type(source) is StackDataset:
        return type(source.datasets) in (tuple, dict) and all(map(_is_readable, _parts(source)))
    return type(source) is Subset and _are_plain(source.indices) and _is_readable(source.dataset)


def _is_stacked_contiguously(tensor: Tensor) -> bool:
    """Whether torch stacks points of the tensor in the way in which they are indexed at once."""
    is_ordinary = (
        tensor.device.type in ("cpu", "cuda")
        and tensor.layout == torch.strided
        and not (tensor.is_nested or tensor.is_quantized)
        and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg())
    )
    if not is_ordinary or tensor.ndim == 0 or len(tensor) == 0:
        return False
    # Points whose channels lie last may be stacked so, and a model may then round otherwise.
    if tensor[0].is_contiguous():
        return True
    stacked = torch.stack([tensor[0], tensor[0]])
    return stacked.stride() == torch.empty(stacked.shape, device="meta").stride()


def _are_plain(indices: object) -> bool:
    if isinstance(indices, np.ndarray):
        return type(indices) is np.ndarray and indices.ndim == 1 and indices.dtype == np.int64
    if isinstance(indices, Tensor):
        is_plain = type(indices) is Tensor and indices.device.type == "cpu"
        return is_plain and indices.ndim == 1 and indices.dtype == torch.int64
    return type(indices) in (list, tuple, range)


def _parts(source: StackDataset[Any]) -> Iterable[object]:
    return source.datasets.values() if isinstance(source.datasets, dict) else source.datasets


class _Irregular(Exception):
    """Indices other than numbers of points, which are left to torch."""


class _Sliced:
    """A dataset that hands a loader whole batches."""

    def __init__(self, dataset: Dataset[object]) -> None:
        self._dataset = dataset

    def __getitems__(self, indices: Iterable[int]) -> object:
        try:
            return _rows(self._dataset, _positions(indices))
        except _Irregular:
            pass
        return default_collate(self._points(indices))

    def _points(self, indices: Iterable[int]) -> list[object]:
        """As the loader itself reads them."""
        of_many = getattr(self._dataset, "__getitems__", None)
        return list(of_many(indices)) if of_many else [self._dataset[i] for i in indices]


def _as_it_is(batch: object) -> object:
    return batch


def _positions(indices: Iterable[int]) -> _Positions:
    # Of a truth value or another kind of number, indexing makes something else.
    if not isinstance(indices, (list, tuple)) or set(map(type, indices)) - {int, np.int64}:
        raise _Irregular
    return np.array(indices, dtype=np.int64)


def _rows(source: object, positions: _Positions) -> object:
    """What torch collates of the points at some positions."""
    if isinstance(source, Tensor):
        return _rows_of_tensors([source], positions)[0]
    if isinstance(source, TensorDataset):
        return _rows_of_tensors(source.tensors, positions)
    if isinstance(source, Subset):
        return _rows(source.dataset, _chosen(source.indices, positions))
    assert isinstance(source, StackDataset)
    if isinstance(source.datasets, dict):
        return {key: _rows(part, positions) for key, part in source.datasets.items()}
    return [_rows(part, positions) for part in source.datasets]


def _chosen(indices: _Indices, positions: _Positions) -> _Positions:
    _require_within(positions, len(indices))
    if isinstance(indices, Tensor):
        return indices.numpy()[positions]
    if isinstance(indices, np.ndarray):
        return indices[positions]
    return _positions([indices[i] for i in positions.tolist()])


def _rows_of_tensors(tensors: Sequence[Tensor], positions: _Positions) -> list[Tensor]:
    for length in {len(tensor) for tensor in tensors}:
        _require_within(positions, length)
    first, last, count = int(positions[0]), int(positions[-1]), len(positions)
    if last - first == count - 1 and bool((np.diff(positions) == 1).all()):
        # A copy: whoever writes to a batch must not write to the dataset.
        return [
            tensor[first : last + 1].clone(memory_format=torch.contiguous_format)
            for tensor in tensors
        ]
    index = torch.from_numpy(positions)
    return [tensor.index_select(0, index.to(tensor.device)) for tensor in tensors]


def _require_within(positions: _Positions, length: int) -> None:
    if len(positions) == 0 or positions.min() < 0 or positions.max() >= length:
        raise _Irregular
