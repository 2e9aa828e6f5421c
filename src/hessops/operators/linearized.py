"""The graphs that a linearized operator retains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from hessops.batch.operation import AddRows, BatchOperation
from hessops.streaming import Batch, BatchStream

logger = logging.getLogger(__name__)

_Part = TypeVar("_Part")

# What the graphs of a linearized operator may take. A constant and not a share of the free memory,
# so that equal calls take the same route on a busy machine and on an idle one.
GRAPH_BYTES = 2**30
# Small batches are joined until their graph and its record take this much: the fixed cost of its
# operations is then paid less often. On a two-core x86 server, a perceptron of 26 000 parameters
# took 1.65 gradients for a product over four batches of 350 points, and 1.15 over one of 1400; for
# one of 670 000 parameters, batches of 512 points took as long as one of 2048.
JOINED_BYTES = 2**26


class GraphMemory:
    """The memory that the graphs of all parts of an operator share.

    Args:
        limit: Bytes; ``None`` is 1 GiB, and for each part no more than its data may take.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.used = 0

    def __reduce__(self) -> tuple[type[Self], tuple[int | None]]:
        """Copies and pickles start empty; parts that share a budget share that of the copy."""
        return type(self), (self.limit,)

    def allows(self, num_bytes: int, data_budget: float) -> bool:
        """Whether some bytes more would fit; `data_budget` is what the data of a part may take."""
        limit = min(GRAPH_BYTES, data_budget) if self.limit is None else self.limit
        return self.used + num_bytes <= limit


class Linearization(Generic[_Part]):
    """One call of `linearize`: what the parts share, for as long as it takes.

    Args:
        memory: The memory of all graphs.
    """

    def __init__(self, memory: GraphMemory) -> None:
        self.memory = memory
        # Beside a result the part itself, whose id would else be free for another.
        self._made: dict[int, tuple[_Part, _Part]] = {}

    def once(self, part: _Part, linearize: Callable[[], _Part]) -> _Part:
        """What a part becomes; one that occurs twice (as in A @ A) is linearized once."""
        if id(part) not in self._made:
            self._made[id(part)] = (part, linearize())
        return self._made[id(part)][1]


@dataclass(frozen=True, eq=False)
class Product:
    """The products of a batch, for an averaging to sum.

    Attributes:
        add: Adds a multiple of them to a tensor.
        rows: The vectors, ``(k, P)``.
    """

    add: AddRows
    rows: Tensor

    def add_to(self, total: Tensor, weight: float) -> None:
        """Adds weight times the products to a tensor ``(k, P)``."""
        self.add(self.rows, total, weight)


@dataclass(frozen=True)
class _Piece:
    """Some points: what multiplies with their matrix, by their graph or by a traversal."""

    size: int
    add: AddRows
    is_retained: bool


class RetainedGraphs:
    """The pieces of a stream whose batches are kept on the device, most of them with their graphs.

    The graphs are made in the first product with such data, and belong to the parameters of then.
    Copies and pickles start without.

    Args:
        memory: What the graphs may take, with those of other operators.
    """

    def __init__(self, memory: GraphMemory) -> None:
        self.memory = memory
        self._pieces: list[_Piece] | None = None
        self._reserved = 0

    def __del__(self) -> None:
        """Gives the memory back to what shares it."""
        self.memory.used -= self._reserved

    def __reduce__(self) -> tuple[type[Self], tuple[GraphMemory]]:
        """Without graphs, which can neither be copied nor pickled."""
        return type(self), (self.memory,)

    def anew(self) -> Self:
        """Nothing retained yet, in the same memory."""
        return type(self)(self.memory)

    @property
    def description(self) -> str:
        """How many of the graphs are retained, for the eye."""
        if self._pieces is None:
            return "graphs not yet made"
        retained = sum(piece.is_retained for piece in self._pieces)
        return f"{retained} of {len(self._pieces)} graphs retained"

    def products(
        self, operation: BatchOperation, stream: BatchStream, rows: Tensor
    ) -> Iterator[tuple[Product, int]]:
        """Products with the rows ``(k, P)``, one for each piece, with its number of points.

        Args:
            operation: Differentiates; every batch of the stream was checked.
            stream: Data that are kept on the device.
            rows: Right-hand factors.
        """
        if self._pieces is None:
            pieces = self._made(operation, stream)
        else:
            pieces = iter(stream.shown(self._pieces, len(self._pieces)))
        for piece in pieces:
            yield Product(piece.add, rows), piece.size

    def _made(self, operation: BatchOperation, stream: BatchStream) -> Iterator[_Piece]:
        """The pieces, each as soon as it is there; they are kept when all are."""
        pieces: list[_Piece] = []
        # Reserved when all are there: a prompt keeps the frames of what was interrupted alive.
        taken = 0
        for group in _groups(operation, list(stream), can_join=not stream.same_batches):
            joined = _joined(group)
            num_bytes = operation.graph_bytes(joined)
            if num_bytes is None or not self.memory.allows(taken + num_bytes, stream.budget):
                for batch in group:
                    add = partial(operation.add_rows, batch)
                    pieces.append(_Piece(batch.size, add, is_retained=False))
                    yield pieces[-1]
                continue
            taken += num_bytes
            pieces.append(_Piece(joined.size, operation.linearized(joined), is_retained=True))
            yield pieces[-1]
        self.memory.used += taken
        self._pieces, self._reserved = pieces, taken
        logger.debug("%s, in %s bytes", self.description, f"{taken:,}")


def _groups(
    operation: BatchOperation, batches: Sequence[Batch], *, can_join: bool
) -> Iterator[list[Batch]]:
    """Successive batches to be joined: alike, and with small graphs."""
    group: list[Batch] = []
    taken = 0
    for batch in batches:
        num_bytes = operation.graph_bytes(batch)
        is_small = can_join and num_bytes is not None and taken + num_bytes <= JOINED_BYTES
        if group and not (is_small and _kind_of(batch) == _kind_of(group[0])):
            yield group
            group, taken = [], 0
        group.append(batch)
        taken += JOINED_BYTES if num_bytes is None else num_bytes
    if group:
        yield group


def _kind_of(batch: Batch) -> object:
    """What two batches must share to be joined; unique where they cannot be."""
    return _form((batch.x, batch.y))


def _form(nested: object) -> object:
    if isinstance(nested, Tensor) and nested.ndim:
        return (nested.shape[1:], nested.dtype)
    if nested is None:
        return None
    if type(nested) in (tuple, list):
        return (type(nested), [_form(item) for item in nested])  # type: ignore[attr-defined]
    if type(nested) is dict:
        return {key: _form(item) for key, item in nested.items()}
    # A number or a tensor without dimensions belongs to its batch as a whole; what else an object
    # of another kind means for the points is not known.
    return object()


def _joined(group: Sequence[Batch]) -> Batch:
    """The points of all batches of a group in one."""
    first = group[0]
    if len(group) == 1:
        return first
    x, y = (_concatenated([getattr(batch, part) for batch in group]) for part in ("x", "y"))
    return Batch(x, y, sum(batch.size for batch in group), first.position)


def _concatenated(parts: Sequence[Any]) -> object:
    """The points of nestings of one form, one after the other."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, (tuple, list)):
        return type(first)(_concatenated(items) for items in zip(*parts, strict=True))
    if isinstance(first, dict):
        return {key: _concatenated([part[key] for part in parts]) for key in first}
    return first
