"""How many bytes a graph retains."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hessops.nested import tensor_leaves
from hessops.streaming import Batch

# A graph is measured on these many points, of which its size is a linear function.
_FEW, _MORE = 2, 4


@dataclass(frozen=True)
class GraphSize:
    """What a graph retains.

    Attributes:
        num_bytes: Memory of all that is saved, each storage once.
        num_tensors: Number of those storages.
    """

    num_bytes: int
    num_tensors: int

    @property
    def mean_bytes(self) -> float:
        """Bytes of one tensor: about what one operation of a backward pass reads."""
        return self.num_bytes / max(1, self.num_tensors)


class RetainedBytes:
    """Counts the memory of tensors that autograd saves, each storage once."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Bytes counted so far."""
        return sum(self._storages.values())

    @property
    def size(self) -> GraphSize:
        """What was counted so far."""
        return GraphSize(self.total, len(self._storages))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what is saved inside the context."""
        with saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int]:
        self._storages[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor, tensor._version


class GraphSizes:
    """Sizes of the graphs of batches, measured on a few points of each kind of batch.

    A graph on n points takes a + b·n bytes, where every point is treated alike; a and b are had
    from the graphs of two and of four points. Counting takes hooks that stay in a graph and slow
    its passes down, so that what is measured is built for that alone.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[GraphSize, GraphSize]] = {}

    def of(self, batch: Batch, build: Callable[[Batch], object]) -> GraphSize:
        """What the graph of a batch retains.

        Args:
            batch: Some points.
            build: Builds the graph of a batch, and returns what keeps it alive.
        """
        few, more = min(batch.size, _FEW), min(batch.size, _MORE)
        key = (few, more, _kind_of(batch))
        if key not in self._known:
            points = [batch.rows(slice(0, count), count) for count in (few, more)]
            self._known[key] = _measured(build, points[0]), _measured(build, points[1])
        of_few, of_more = self._known[key]
        if more == few:
            return of_more
        by_point = (of_more.num_bytes - of_few.num_bytes) / (more - few)
        num_bytes = of_more.num_bytes + by_point * (batch.size - more)
        return GraphSize(int(num_bytes), of_more.num_tensors)


def _measured(build: Callable[[Batch], object], batch: Batch) -> GraphSize:
    retained = RetainedBytes()
    with retained.counting():
        kept = build(batch)
    size = retained.size
    del kept
    return size


def _kind_of(batch: Batch) -> Hashable:
    """What the size of the graph of a point depends on, as far as its data show."""
    return tuple((leaf.shape[1:], leaf.dtype) for leaf in tensor_leaves((batch.x, batch.y)))


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    """The tensor, unless it was written to since: hooks switch torch's own guard off."""
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "a tensor that is needed for the gradient was modified by an in-place operation"
        )
    return tensor
