"""Factors and influences of collections, computed chunk by chunk when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hessops.copies import Copyable
from hessops.errors import ArgumentError, DistributedError, ShapeError
from hessops.files import digest_of_tensors
from hessops.influence.description import (
    Description,
    digest_of_description,
)
from hessops.influence.gradients import require_floating
from hessops.influence.model import InfluenceFunctionModel
from hessops.influence.modes import InfluenceMode
from hessops.influence.ordered import OrderedBatches, Placed
from hessops.influence.storage import ChunkStore, ZarrArray, manifest_of
from hessops.isolation import isolated
from hessops.printed import Node, Printed, counted, size_of
from hessops.progress import Bar, progress_bar
from hessops.validation import checked_count

# Chunks of a store are at least this large, where there are as many numbers.
CHUNK_BYTES = 2**20

# Test points, and training points of each, that are printed.
SHOWN_POINTS = 5

Wanted = Callable[[slice], bool]


@dataclass(frozen=True, repr=False)
class Rows(Printed):
    """Some rows of the factors of a collection.

    Attributes:
        points: Which points.
        factors: ``(m, P)``; ``None`` where nobody wanted them.
    """

    points: slice
    factors: Tensor | None

    def _node(self) -> Node:
        note = "not computed" if self.factors is None else size_of(self.factors)
        return Node(f"Rows({_span(self.points)})", note)


class FactorSource(Copyable, Printed, ABC):
    """The factors of m test points, some rows at a time."""

    @abstractmethod
    def rows(self, wanted: Wanted) -> Iterator[Rows]:
        """All rows in their order; those of which `wanted` says no need not be computed."""

    @property
    @abstractmethod
    def num_points(self) -> int:
        """m; it may take a pass over the data."""

    @property
    @abstractmethod
    def num_pieces(self) -> int | None:
        """How many times `rows` yields, where that is known."""

    @abstractmethod
    def first_size(self) -> int:
        """Rows that `rows` yields first."""

    def require_resumable(self) -> None:  # what is there already is
        """Raises `DistributedError` where some rows cannot be computed without the others."""

    def _printed_points(self) -> Printed:
        """What is printed of the test points."""
        return self

    @abstractmethod
    def description(self, model: InfluenceFunctionModel) -> Description:
        """What decides the factors beside a model, which is in the manifest anyway."""


class GivenFactors(FactorSource):
    """Factors that are there already: a tensor, or an array on disk.

    Args:
        factors: ``(m, P)``, anything that can be sliced by rows and has a shape.
        read: From a slice of it to a tensor on the model's device, checked.
    """

    # Rows that are read at once.
    PIECE = 256

    def __init__(self, factors: Tensor | ZarrArray, read: Callable[[object], Tensor]) -> None:
        if not factors.shape[0]:
            raise ShapeError("factors has no rows: there is no test point")
        self._factors, self._read = factors, read

    def _node(self) -> Node:
        rows, columns = self._factors.shape
        return Node(f"GivenFactors({type(self._factors).__name__})", f"{rows} x {columns}")

    def rows(self, wanted: Wanted) -> Iterator[Rows]:
        """As of `FactorSource`."""
        for start in range(0, self.num_points, self.PIECE):
            points = slice(start, min(start + self.PIECE, self.num_points))
            yield Rows(points, self._read(self._factors[points]) if wanted(points) else None)

    @property
    def num_points(self) -> int:
        """m."""
        return int(self._factors.shape[0])

    @property
    def num_pieces(self) -> int:
        """m divided by `PIECE`, rounded up."""
        return -(-self.num_points // self.PIECE)

    def first_size(self) -> int:
        """`PIECE`, or m where that is smaller."""
        return min(self.PIECE, self.num_points)

    def description(self, model: InfluenceFunctionModel) -> Description:
        """Hashes of the pieces."""
        pieces = (self._read(self._factors[rows.points]) for rows in self.rows(lambda _: False))
        return [digest_of_tensors({"factors": piece}) for piece in pieces]


class LazyFactors(FactorSource):
    r"""The factors :math:`(A + \lambda I)^{-1} g_i` of a collection of points, ``(m, P)``.

    Made by `SequentialInfluenceCalculator.influence_factors`. Nothing is computed until it is asked
    for, and nothing is kept.

    Example:
        >>> import torch
        >>> from hessops.influence import DirectInfluence, SequentialInfluenceCalculator
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = [(torch.ones(2, 1), torch.ones(2, 1)), (torch.zeros(1, 1), torch.zeros(1, 1))]
        >>> influence = DirectInfluence(model, torch.nn.MSELoss(), 0.1).fit(data)
        >>> factors = SequentialInfluenceCalculator(influence).influence_factors(data)
        >>> [part.shape for part in factors]
        [torch.Size([2, 1]), torch.Size([1, 1])]
        >>> factors.compute().shape
        torch.Size([3, 1])
    """

    def __init__(
        self, model: InfluenceFunctionModel, batches: OrderedBatches, *, progress: bool = False
    ) -> None:
        self._model, self._batches, self._progress = model, batches, progress

    def _node(self) -> Node:
        return Node("LazyFactors()", parts=[self._batches, self._model])

    def _printed_points(self) -> Printed:
        return self._batches

    def __iter__(self) -> Iterator[Tensor]:
        """The factors of one batch after the other, ``(m_batch, P)`` on the model's device."""
        with self._bar("batch", self.num_pieces) as bar:
            for rows in self.rows(lambda _: True):
                assert rows.factors is not None
                yield rows.factors
                bar.advance()

    def rows(self, wanted: Wanted) -> Iterator[Rows]:
        """The factors of the batches that are wanted, and ``None`` for the others."""
        for placed in self._batches:
            needed = wanted(placed.points)
            yield Rows(placed.points, self._model.factors_of(placed.batch) if needed else None)

    def compute(self) -> Tensor:
        """All factors, ``(m, P)`` in host memory."""
        return torch.cat([part.cpu() for part in self])

    def to_zarr(self, path: str | Path, *, row_chunk: int | None = None) -> ZarrArray:
        """Writes the factors to a zarr array, chunk by chunk, or goes on where a run stopped.

        See `LazyInfluences.to_zarr`.

        Args:
            path: A directory that does not exist yet, is empty, or holds what an earlier run of
                the same computation wrote.
            row_chunk: Points in a chunk; ``None`` takes the size of the first batch.

        Returns:
            The array, ``(m, P)``, opened for reading.

        Raises:
            StoreError, DistributedError, DtypeError, ImportError, OSError: As of
                `LazyInfluences.to_zarr`.
        """
        self.require_resumable()
        rows = self.first_size() if row_chunk is None else row_chunk
        columns = self._model.space.size
        with isolated(self._model.space.device):
            store = ChunkStore.open(
                path,
                shape=(self.num_points, columns),
                chunks=(checked_count(rows, "row_chunk"), columns),
                dtype=self._model.space.dtype,
                manifest=manifest_of(
                    self._model,
                    {"kind": "factors", "points": self.description(self._model)},
                    self._batches.first(),
                ),
            )
            missing = store.missing()
            with self._bar("chunk", store.grid[0]) as bar:
                bar.advance(store.grid[0] - len(missing))
                for block, factors in regular_rows(self, rows, missing):
                    store.write((block, 0), factors)
                    bar.advance()
            return store.reader()

    def _bar(self, unit: str, total: int | None) -> AbstractContextManager[Bar]:
        return progress_bar("influence factors", unit, total, show=self._progress, keep=True)

    @property
    def num_points(self) -> int:
        """m; takes a pass over the data, once."""
        return self._batches.survey().num_points

    @property
    def num_pieces(self) -> int | None:
        """Number of batches, once it is known."""
        return self._batches.num_batches

    def require_resumable(self) -> None:
        """As of `FactorSource`: processes solve together, but may have written different chunks."""
        inverses = self._model.inverses.values()
        if any(inverse.processes.size > 1 for inverse in inverses):
            raise DistributedError(
                "factors are solved for by all processes together, and scores are of the points of "
                "each: compute() the factors first, and take what influences_from_factors gives "
                "for them; write that in each process to a path of its own"
            )

    def first_size(self) -> int:
        """Points of the first batch."""
        return self._batches.survey().sizes[0]

    def description(self, model: InfluenceFunctionModel) -> Description:
        """The sizes of the batches and a hash of their points in order; and a foreign model."""
        survey = self._batches.survey()
        points: dict[str, Description] = {"order": survey.order, "batches": list(survey.sizes)}
        if self._model.fitted is not model.fitted:
            points["model"] = digest_of_description(manifest_of(self._model, {}))
        return points


@dataclass(frozen=True, repr=False)
class InfluenceChunk(Printed):
    """The influences of some training points on some test points.

    Attributes:
        test: Which test points.
        train: Which training points.
        values: ``(m, n)`` for UP, ``(m, n, *x.shape[1:])`` for PERTURBATION.
    """

    test: slice
    train: slice
    values: Tensor

    def _node(self) -> Node:
        where = f"test {_span(self.test)}, train {_span(self.train)}"
        return Node(f"InfluenceChunk({where})", size_of(self.values))


@dataclass(frozen=True, eq=False, repr=False)
class TopInfluences(Printed):
    """For each test point the training points of largest, or smallest, influence.

    Attributes:
        values: Influences, ``(m, k)``, the most extreme first.
        indices: Positions of the training points in the order of their loader, ``(m, k)`` int64.
            Of equal influences the earlier point comes first.
    """

    values: Tensor
    indices: Tensor

    def _node(self) -> Node:
        count, k = self.values.shape
        points = counted(count, "test point")
        return Node(
            f"TopInfluences(the {counted(k, 'training point')} for each of {points})",
            parts=[Node(self._row(number)) for number in range(min(count, SHOWN_POINTS))]
            + ([Node(f"… {count - SHOWN_POINTS} more")] if count > SHOWN_POINTS else []),
        )

    def _row(self, number: int) -> str:
        """The training points of a test point with their influences, a few of them."""
        indices = self.indices[number, :SHOWN_POINTS].tolist()
        values = self.values[number, :SHOWN_POINTS].tolist()
        pairs = [f"{i}: {v:.3g}" for i, v in zip(indices, values, strict=True)]
        more = ", …" if self.values.shape[1] > SHOWN_POINTS else ""
        return f"test point {number} <- {', '.join(pairs)}{more}"


class LazyInfluences(Copyable, Printed):
    """The influences of n training points on m test points, chunk by chunk.

    Made by `SequentialInfluenceCalculator`. Nothing is computed until it is asked for, and nothing
    is kept: every method makes one pass over the training data for each batch of test points.
    Whatever asks for influences may raise what the model raises (see
    `InfluenceFunctionModel.influences`); `DataChangedError` where a pass over the data has other
    batches or another order than the first; and `ShapeError` for inputs of several shapes in mode
    PERTURBATION.

    Example:
        >>> import torch
        >>> from hessops.influence import DirectInfluence, SequentialInfluenceCalculator
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.arange(4.0).reshape(4, 1), torch.zeros(4, 1)
        >>> train = [(x[:3], y[:3]), (x[3:], y[3:])]
        >>> influence = DirectInfluence(model, torch.nn.MSELoss()).fit(train)
        >>> lazy = SequentialInfluenceCalculator(influence).influences([(x[1:2], y[1:2])], train)
        >>> lazy.top_k(2).indices
        tensor([[3, 2]])
        >>> lazy.compute().shape
        torch.Size([1, 4])
    """

    def __init__(
        self,
        model: InfluenceFunctionModel,
        factors: FactorSource,
        train: OrderedBatches,
        mode: InfluenceMode,
        *,
        progress: bool = False,
    ) -> None:
        self._model, self._factors, self._train = model, factors, train
        self.mode = mode
        self._progress = progress

    def _node(self) -> Node:
        parts = [self._factors._printed_points(), self._train, self._model]
        return Node(f"LazyInfluences(mode={str(self.mode)!r})", parts=parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(m, n)``, for PERTURBATION with the dimensions of an input; takes a pass over both."""
        return (self._factors.num_points, self._train.survey().num_points, *self._trailing())

    def _trailing(self) -> tuple[int, ...]:
        if self.mode is InfluenceMode.UP:
            return ()
        return tuple(require_floating(self._train.first().x).shape[1:])

    def __iter__(self) -> Iterator[InfluenceChunk]:
        """One chunk for each pair of a test and a training batch, on the model's device.

        Raises:
            DistributedError: Factors are to be solved for by several processes together.
        """
        self._factors.require_resumable()
        with self._bar(self._num_chunks()) as bar:
            for rows in self._factors.rows(lambda _: True):
                assert rows.factors is not None
                for placed in self._train:
                    values = self._scored(rows.factors, placed)
                    yield InfluenceChunk(rows.points, placed.points, values)
                    bar.advance()

    def _scored(self, factors: Tensor, placed: Placed) -> Tensor:
        """The influences of a batch.

        Raises:
            ShapeError: Its inputs have another shape than those before, in mode PERTURBATION.
        """
        if self.mode is InfluenceMode.PERTURBATION:
            shape = tuple(require_floating(placed.batch.x).shape[1:])
            if shape != self._trailing():
                raise ShapeError(
                    f"batch {placed.batch.position} of the training points has inputs of shape "
                    f"{shape}, the first one {self._trailing()}: influences of inputs need one "
                    "shape; pad them"
                )
        with isolated(self._model.space.device):
            return self._model.scores_of(factors, placed.batch, self.mode)

    def _bar(self, total: int | None) -> AbstractContextManager[Bar]:
        return progress_bar("influences", "chunk", total, show=self._progress, keep=True)

    def _num_chunks(self) -> int | None:
        """How many `__iter__` yields, where that is known."""
        tests, trains = self._factors.num_pieces, self._train.num_batches
        return None if tests is None or trains is None else tests * trains

    def compute(self) -> Tensor:
        """All of them in host memory, ``(m, n)`` or ``(m, n, *x.shape[1:])``."""
        rows: list[list[Tensor]] = []
        for chunk in self:
            if chunk.train.start == 0:
                rows.append([])
            rows[-1].append(chunk.values.cpu())
        return torch.cat([torch.cat(row, dim=1) for row in rows])

    def top_k(self, k: int, *, largest: bool = True) -> TopInfluences:
        """The k training points of largest influence on each test point.

        Keeps 2·k numbers for each test point, never the whole matrix.

        Args:
            k: How many; all where there are fewer training points.
            largest: ``True`` for the most helpful, ``False`` for the most harmful.

        Raises:
            ArgumentError: `k` is below 1, or the mode is PERTURBATION.
        """
        checked_count(k, "k")
        if self.mode is not InfluenceMode.UP:
            raise ArgumentError("top_k needs mode UP: influences of an input are not one number")
        best: list[TopInfluences] = []
        for chunk in self:
            positions = torch.arange(chunk.train.start, chunk.train.stop)
            values = chunk.values.cpu()
            new = TopInfluences(values, positions.expand_as(values))
            if chunk.train.start == 0:
                best.append(_most_extreme([new], k, largest=largest))
            else:
                best[-1] = _most_extreme([best[-1], new], k, largest=largest)
        return TopInfluences(
            torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])
        )

    def to_zarr(
        self, path: str | Path, *, row_chunk: int | None = None, column_chunk: int | None = None
    ) -> ZarrArray:
        """Writes the influences to a zarr array, chunk by chunk, or goes on where a run stopped.

        Every chunk is a file that is there whole or not at all, beside a manifest with hashes of
        parameters, settings, data order and losses, chunk sizes, threads and versions. A run with
        the same manifest computes what is missing, to the same bytes; any other is refused. It
        begins with a pass over both collections. Needs zarr 3 (``pip install hessops[zarr]``).

        Args:
            path: A directory that does not exist yet, is empty, or holds what an earlier run of
                the same computation wrote.
            row_chunk: Test points in a chunk; ``None`` takes the size of the first batch.
            column_chunk: Training points in a chunk; ``None`` takes as many batches of the size of
                the first as make 1 MiB.

        Returns:
            The array, ``(m, n)`` or ``(m, n, *x.shape[1:])``, opened for reading.

        Raises:
            StoreError: Something else lies at `path`; the message says what differs.
            DistributedError: Factors are to be solved for by several processes together.
            DtypeError: Influences of a dtype that numpy does not have.
            ImportError: zarr is not installed.
            OSError: Of the file system; what was written before is whole.
        """
        self._factors.require_resumable()
        with isolated(self._model.space.device):
            store = self._store(path, row_chunk, column_chunk)
            missing, total = store.missing(), prod(store.grid)
            with self._bar(total) as bar:
                bar.advance(total - sum(map(len, missing.values())))
                self._fill(store, missing, bar)
            return store.reader()

    def _store(
        self, path: str | Path, row_chunk: int | None, column_chunk: int | None
    ) -> ChunkStore:
        shape, survey, space = self.shape, self._train.survey(), self._model.space
        rows = self._factors.first_size() if row_chunk is None else row_chunk
        if column_chunk is None:
            number_bytes = space.dtype.itemsize * prod(shape[2:])
            batch_bytes = rows * survey.sizes[0] * number_bytes
            batches = max(1, -(-CHUNK_BYTES // max(batch_bytes, 1)))
            column_chunk = min(batches * survey.sizes[0], survey.num_points)
        chunks = (
            checked_count(rows, "row_chunk"),
            checked_count(column_chunk, "column_chunk"),
            *shape[2:],
        )
        what: dict[str, Description] = {
            "kind": "influences",
            "mode": str(self.mode),
            "test": self._factors.description(self._model),
            "train": {"order": survey.order, "batches": list(survey.sizes)},
        }
        manifest = manifest_of(self._model, what, self._train.first())
        return ChunkStore.open(
            path, shape=shape, chunks=chunks, dtype=self._dtype(), manifest=manifest
        )

    def _dtype(self) -> torch.dtype:
        if self.mode is InfluenceMode.UP:
            return self._model.space.dtype
        return require_floating(self._train.first().x).dtype

    def _fill(self, store: ChunkStore, missing: Mapping[int, set[int]], bar: Bar) -> None:
        """Computes and writes the chunks that a store does not hold, row -> columns."""
        for row, factors in regular_rows(self._factors, store.chunks[0], missing):
            for column, values in self._columns(factors, store.chunks[1], missing[row]):
                store.write((row, column), values)
                bar.advance()

    def _columns(
        self, factors: Tensor, width: int, wanted: Container[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """The influences by columns of a regular width, those that are wanted."""
        pieces = (
            (
                placed.points,
                self._scored(factors, placed).cpu()
                if _any_wanted(placed.points, width, wanted)
                else None,
            )
            for placed in self._train
        )
        return regrouped(pieces, width, self._train.survey().num_points, wanted, dim=1)


def _span(points: slice) -> str:
    return f"{points.start}:{points.stop}"


def _blocks_of(points: slice, width: int) -> range:
    """The blocks of a regular width that some points lie in."""
    return range(points.start // width, -(-points.stop // width))


def _any_wanted(points: slice, width: int, wanted: Container[int]) -> bool:
    return any(block in wanted for block in _blocks_of(points, width))


def regular_rows(
    source: FactorSource, height: int, wanted: Container[int]
) -> Iterator[tuple[int, Tensor]]:
    """Factors by blocks of a regular number of rows, those that are wanted.

    Args:
        source: Factors by rows of any number.
        height: Rows of a block.
        wanted: The blocks that are.
    """
    pieces = (
        (rows.points, rows.factors)
        for rows in source.rows(lambda points: _any_wanted(points, height, wanted))
    )
    return regrouped(pieces, height, source.num_points, wanted, dim=0)


def regrouped(
    pieces: Iterable[tuple[slice, Tensor | None]],
    width: int,
    total: int,
    wanted: Container[int],
    *,
    dim: int,
) -> Iterator[tuple[int, Tensor]]:
    """Consecutive pieces of any width as blocks of a regular one.

    Args:
        pieces: Where each piece is along `dim`, and the piece; ``None`` where it is in no block
            that is wanted.
        width: That of a block; the last one may be narrower.
        total: That of all pieces.
        wanted: The numbers of the blocks to yield.
        dim: The dimension along which there are pieces.

    Example:
        >>> import torch
        >>> from hessops.influence.lazy import regrouped
        >>> pieces = [(slice(0, 3), torch.tensor([0, 1, 2])), (slice(3, 5), torch.tensor([3, 4]))]
        >>> list(regrouped(pieces, 2, 5, {1, 2}, dim=0))
        [(1, tensor([2, 3])), (2, tensor([4]))]
    """
    pending: list[Tensor] = []
    for where, piece in pieces:
        if piece is None:
            continue
        for block in _blocks_of(where, width):
            if block not in wanted:
                continue
            start, stop = block * width, min((block + 1) * width, total)
            first, last = max(start, where.start), min(stop, where.stop)
            pending.append(piece.narrow(dim, first - where.start, last - first))
            if where.stop >= stop:
                yield block, torch.cat(pending, dim=dim)
                pending = []


def _most_extreme(candidates: list[TopInfluences], k: int, *, largest: bool) -> TopInfluences:
    values = torch.cat([c.values for c in candidates], dim=1)
    indices = torch.cat([c.indices for c in candidates], dim=1)
    # Stable, and the candidates come in the order of the points: ties go to the earlier point.
    order = values.argsort(dim=1, descending=largest, stable=True)[:, :k]
    return TopInfluences(values.gather(1, order), indices.gather(1, order))
