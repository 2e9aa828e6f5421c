"""How many bytes a graph retains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class RetainedBytes:
    """Counts the memory of tensors that autograd saves, each storage once."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Bytes counted so far."""
        return sum(self._storages.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what is saved inside the context."""
        with saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int]:
        self._storages[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor, tensor._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    """The tensor, unless it was written to since: hooks switch torch's own guard off."""
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "a tensor that is needed for the gradient was modified by an in-place operation"
        )
    return tensor
