"""Batch and BatchStream: the data of an operator, replayed pass after pass."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
)

from hessops.copies import Copyable
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataChangedError,
    DataError,
    OneShotDataError,
)
from hessops.hashing import SumOfPoints, mixed, word_of_values
from hessops.isolation import HostRandomState
from hessops.nested import map_tensors, named_tensor_leaves, plain_leaves, tensor_leaves
from hessops.printed import Node, Printed, counted, described, size_of
from hessops.processes import ONE_PROCESS, Processes
from hessops.progress import followed
from hessops.slicing import draws_from_torch_only, sliced

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")
Unpack = Callable[[object], tuple[object, object]]

# What `cache="auto"` may hold. A constant and not a share of the free memory, so that equal calls
# take the same route on a busy machine and on an idle one.
AUTO_CACHE_BYTES = 2**30


@dataclass(frozen=True, repr=False)
class Batch(Printed):
    """Some points: inputs and targets whose tensors share their leading dimension.

    Attributes:
        x: Inputs: a tensor ``(n, ...)``, or a tuple, list or mapping of such tensors.
        y: Targets, likewise; ``None`` where the loss needs none.
        size: n, the number of points.
        position: Place of the batch in its pass, for messages.

    Example:
        >>> import torch
        >>> from hessops import Batch
        >>> batch = Batch.from_raw((torch.zeros(5, 3), torch.zeros(5)))
        >>> batch.size
        5
    """

    x: object
    y: object
    size: int
    position: int = 0

    @classmethod
    def from_raw(cls, raw: object, unpack: Unpack | None = None, position: int = 0) -> Batch:
        """Reads what a loader yields.

        Args:
            raw: A pair ``(x, y)``; anything else needs `unpack`.
            unpack: Function from the raw batch to ``(x, y)``.
            position: Place of the batch in its pass.

        Raises:
            DataError: Not a pair, no tensor with a leading dimension, or lengths that disagree.
        """
        if isinstance(raw, Batch):
            _require_size(raw, position)
            return raw
        pair = raw if unpack is None else unpack(raw)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            source = "the dataloader yields" if unpack is None else "unpack returns"
            raise DataError(
                f"batch {position}: {source} {_describe(pair)}, expected a pair (x, y); "
                "pass unpack=, a function from a batch to (x, y)"
                + ("; one batch alone is [(x, y)]" if isinstance(pair, Tensor) else "")
            )
        x, y = pair
        return cls(x, y, size=_common_length(x, y, position), position=position)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on `device`."""
        # A copy to the CPU that does not block can be read before it has arrived.
        non_blocking = torch.device(device).type == "cuda"

        def move(tensor: Tensor) -> Tensor:
            moved = tensor.detach().to(device, non_blocking=non_blocking)
            # Tensors made in inference mode cannot be saved for a backward pass; copies can.
            return moved.clone() if moved.is_inference() else moved

        return replace(self, x=map_tensors(move, self.x), y=map_tensors(move, self.y))

    def rows(self, index: Tensor | slice, size: int) -> Batch:
        """The points at some positions; tensors without dimensions are shared by all points."""
        return replace(self, x=take_rows(self.x, index), y=take_rows(self.y, index), size=size)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors, in bytes."""
        return sum(t.numel() * t.element_size() for t in tensor_leaves((self.x, self.y)))

    def _node(self) -> Node:
        shown = [f"{name}: {_form(part)}" for name, part in (("x", self.x), ("y", self.y))]
        return Node(f"Batch({', '.join([counted(self.size, 'point'), *shown])})")


def _form(part: object) -> str:
    """Inputs or targets in a few words."""
    return f"[{size_of(part)}]" if isinstance(part, Tensor) else described(part)


def _require_size(batch: Batch, position: int) -> None:
    length = _common_length(batch.x, batch.y, position)
    if batch.size != length:
        raise DataError(
            f"batch {position}: size is {batch.size}, but the tensors have {length} points; make "
            "the batch with Batch.from_raw((x, y))"
        )


def take_rows(nested: object, index: Tensor | slice) -> object:
    """Indexes the leading dimension of every tensor that has one."""
    return map_tensors(lambda t: t[index] if t.ndim else t, nested)


def _common_length(x: object, y: object, position: int) -> int:
    lengths: dict[str, int] = {}
    for part, name in ((x, "x"), (y, "y")):
        leaves = dict(named_tensor_leaves(part, name))
        if not leaves and name == "x":
            raise DataError(f"batch {position}: x holds no tensor but is {_describe(part)}")
        if leaves and all(t.ndim == 0 for t in leaves.values()):
            raise DataError(
                f"batch {position}: {name} has no leading dimension over points (a scalar tensor); "
                "is this a single point instead of a batch?"
            )
        for leaf, tensor in leaves.items():
            if tensor.layout != torch.strided:
                raise DataError(
                    f"batch {position}: {leaf} is sparse ({tensor.layout}), which cannot be "
                    "differentiated twice; convert it with .to_dense() in collate_fn or unpack"
                )
        lengths |= {leaf: len(t) for leaf, t in leaves.items() if t.ndim}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"batch {position}: tensors disagree in their number of points: "
            + ", ".join(f"{leaf} has {n}" for leaf, n in lengths.items())
        )
    return next(iter(lengths.values()))


class BatchStream(Copyable, Printed):
    """Replays an iterable of batches: the same points in every pass, counted and on one device.

    The loader's own order, sampler, batch sampler and ``collate_fn`` are honoured. It runs under a
    private random state, so that a pass leaves the global one as it was (iterating any
    ``DataLoader`` without a generator draws from it). Data that differ from pass to pass, as with
    random augmentation, are detected by a fingerprint that does not depend on the order of the
    points, and refused; a shuffled order is fine.

    When all batches fit the byte budget they are kept on the device. Before kept batches are used a
    second time the data are loaded once more and compared, so that a cache never hides an
    augmentation.

    Args:
        data: A ``DataLoader``, a list of batches, or any iterable that can be iterated again.
        device: Where the batches go.
        unpack: Function from a raw batch to ``(x, y)``; ``None`` expects pairs.
        cache: ``"auto"`` keeps the batches when they fit 1 GiB, ``True`` always, ``False`` never,
            a number of bytes sets the budget. Part of a stream is never kept.
        progress: Shows a progress bar over the batches of each pass.
        same_batches: Refuses data whose points come in other batches in a later pass, and not only
            other points.
        may_be_empty: Accepts data without a point: other processes hold some.

    Raises:
        OneShotDataError: `data` is an iterator or generator.
        ArgumentTypeError: `data` cannot be iterated, or is a dataset or tensor, not batches.
        DataError: There are no batches.
        ArgumentError: `cache` is none of the above.

    Example:
        >>> import torch
        >>> from hessops import BatchStream
        >>> stream = BatchStream(
        ...     [(torch.zeros(3, 2), torch.zeros(3)), (torch.ones(1, 2), torch.ones(1))]
        ... )
        >>> [batch.size for batch in stream], stream.num_points
        ([3, 1], 4)
    """

    _names_of_parts: ClassVar[Mapping[str, str]] = {"data": "dataloader"}
    _left_behind = ("_kept", "_kept_from")

    def __init__(
        self,
        data: Iterable[object],
        *,
        device: torch.device | str = "cpu",
        unpack: Unpack | None = None,
        cache: str | bool | int = "auto",
        progress: bool = False,
        same_batches: bool = False,
        may_be_empty: bool = False,
    ) -> None:
        _require_replayable(data, may_be_empty=may_be_empty)
        self.data = data
        self.device = torch.device(device)
        self.unpack = unpack
        self.cache = cache
        self.progress = progress
        self.same_batches = same_batches
        self.may_be_empty = may_be_empty
        # Bytes that the batches may take on the device; 0 keeps none.
        self.budget = _cache_budget(cache)
        self._random_state = _state_seeded(torch.initial_seed())
        self._first_pass: _Fingerprint | None = None
        self._kept: list[Batch] | None = None
        # The random state before the pass whose batches are kept.
        self._kept_from: HostRandomState | None = None
        self._overflows = False
        self._kept_is_verified = False

    @property
    def num_points(self) -> int | None:
        """Number of points; ``None`` before the first whole pass."""
        return None if self._first_pass is None else self._first_pass.num_points

    @property
    def fingerprint(self) -> str | None:
        """A hash of the points that does not depend on their order; ``None`` before a whole pass.

        On the meta device, where there are no values, it is that of their number.
        """
        return None if self._first_pass is None else self._first_pass.digest()

    def survey(self, processes: Processes = ONE_PROCESS) -> str:
        """The `fingerprint` of the data in all processes, by a pass over them if there was none.

        It does not depend on how the points are split among the processes.

        Raises:
            DataError: There is no point in any of them.
            HessopsError: As of a pass.
        """

        def own() -> tuple[int, int]:
            if self._first_pass is None:
                for _ in self:
                    pass
            assert self._first_pass is not None
            return self._first_pass.words()

        num_points, value = map(sum, zip(*processes.gathered(own, 2), strict=True))
        if num_points == 0:
            raise DataError(f"dataloader is empty in all {processes.size} processes")
        return _printed(num_points, value)

    @property
    def is_cached(self) -> bool:
        """Whether the batches of the last pass are kept on the device."""
        return self._kept is not None

    @property
    def is_settled(self) -> bool:
        """Whether it is known if the batches are kept; a pass settles it."""
        return self._kept is not None or self._overflows or self.budget == 0

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of one pass; empty batches are left out.

        Raises:
            DataError: The pass gave no point at all.
            DataChangedError: The pass gave other points than the first one.
        """
        if self._kept is None:
            yield from self._load()
            return
        if not self._kept_is_verified:
            for _ in self._load(keep=False):
                pass
            self._kept_is_verified = True
        yield from self.shown(self._kept, len(self._kept))

    def replayed(self, seed: int) -> BatchStream:
        """The same stream with a random state of its own, so that its order depends on the seed.

        Nothing is kept, as what is kept would come in the same order in every pass.
        """
        replay = copy.copy(self)
        replay._random_state = _state_seeded(seed)
        replay.budget, replay._kept = 0, None
        return replay

    @property
    def has_fixed_order(self) -> bool:
        """Whether every pass is known to give the same batches in the same order."""
        return _has_fixed_order(self.data)

    def __getstate__(self) -> object:
        """A copy loads its batches again, in the order of those that are kept here."""
        state = super().__getstate__()
        begun = {"_random_state": self._kept_from or self._random_state}
        return state | begun if isinstance(state, dict) else state

    def to(self, device: torch.device | str) -> BatchStream:
        """The same stream on another device; kept batches move along."""
        moved = BatchStream(
            self.data,
            device=device,
            unpack=self.unpack,
            cache=self.cache,
            progress=self.progress,
            same_batches=self.same_batches,
            may_be_empty=self.may_be_empty,
        )
        without_values = moved.device.type == "meta"
        moved._first_pass = None if without_values else self._first_pass
        moved._random_state = self._random_state
        if self._kept is not None:
            moved._kept = [batch.to(device) for batch in self._kept]
            moved._kept_from = self._kept_from
            moved._kept_is_verified = self._kept_is_verified or without_values
        return moved

    def _load(self, *, keep: bool = True) -> Iterator[Batch]:
        """One pass over the data themselves."""
        fingerprint = _Fingerprint(by_batch=self.same_batches)
        kept: list[Batch] | None = [] if keep and self.budget > 0 else None
        kept_bytes = 0
        length = known_length(self.data)
        # A pass that is given up leaves the order of the next ones as it was.
        private = _PrivateRandomState(self._random_state)
        raw_batches = private.iterate(self.data)
        for position, raw in enumerate(self.shown(raw_batches, length)):
            original = Batch.from_raw(raw, self.unpack, position)
            if original.size == 0:
                continue
            batch = original.to(self.device)
            fingerprint.add(batch)
            if kept is not None:
                kept_bytes += batch.num_bytes
                if kept_bytes > self.budget:
                    kept, self._overflows = None, True
                else:
                    kept.append(_owned(batch, original))
            yield batch
        fingerprint.close()
        had_points = self._first_pass is not None and self._first_pass.num_points > 0
        if fingerprint.num_points == 0 and (had_points or not self.may_be_empty):
            raise self._emptiness()
        if self._first_pass is None:
            self._first_pass = fingerprint
        else:
            self._first_pass.require_equal(fingerprint)
        if kept is not None:
            self._kept, self._kept_from = kept, self._random_state
            logger.debug("%d batches are kept on %s: %d bytes", len(kept), self.device, kept_bytes)
        self._random_state = private.state

    def _emptiness(self) -> DataError:
        if self._first_pass is None:
            return DataError("dataloader is empty: a pass over it gave no point")
        return OneShotDataError(
            "dataloader gave no point after its first pass: it can be iterated only once, but an "
            "operator passes over the data for every application; pass a DataLoader or a list of "
            "batches"
        )

    def shown(self, batches: Iterable[_Item], length: int | None) -> Iterable[_Item]:
        """The batches of a pass, behind a progress bar where that was asked for."""
        return followed(batches, "batches", "batch", length, show=self.progress)

    def _node(self) -> Node:
        points = "not yet counted" if self.num_points is None else f"{self.num_points}"
        kept = "kept on the device" if self.is_cached else "loaded in every pass"
        data = type(self.data).__name__
        return Node(f"BatchStream({data}, points: {points}, {kept}, {self.device})")


def _require_replayable(data: object, *, may_be_empty: bool) -> None:
    if isinstance(data, (Tensor, Mapping, str, bytes)):
        raise ArgumentTypeError(
            f"dataloader must be an iterable of batches, got {type(data).__name__}; "
            "wrap one batch as [(x, y)]"
        )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ArgumentTypeError(
            f"dataloader is the dataset {type(data).__name__}, whose items are single points; "
            "wrap it: torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise ArgumentTypeError(
            f"dataloader must be an iterable of batches, got {type(data).__name__}"
        )
    if hasattr(data, "__next__"):
        raise OneShotDataError(
            f"dataloader is a one-shot iterator ({type(data).__name__}), but an operator passes "
            "over the data once for every application; pass a DataLoader or a list of batches"
        )
    if known_length(data) == 0 and not may_be_empty:
        raise DataError(
            "dataloader is empty: it has no batches (a BatchStream of an empty shard needs "
            "may_be_empty=True)"
        )


def _has_fixed_order(data: object) -> bool:
    if isinstance(data, DataLoader):
        batch_sampler, sampler = type(data.batch_sampler), getattr(data, "sampler", None)
        in_order = batch_sampler in (BatchSampler, type(None))
        return in_order and isinstance(sampler, SequentialSampler)
    return isinstance(data, (list, tuple))


def known_length(data: object) -> int | None:
    """`len`, where it works: a DataLoader over an iterable dataset declares it and then refuses."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except (TypeError, NotImplementedError):
        return None


def _cache_budget(cache: str | bool | int) -> float:
    if cache is True:
        return float("inf")
    if cache is False:
        return 0
    if isinstance(cache, int) and cache >= 0:
        return cache
    if isinstance(cache, str) and cache == "auto":
        return AUTO_CACHE_BYTES
    raise ArgumentError(
        f"cache must be 'auto', True, False or a number of bytes >= 0, got {cache!r}"
    )


def _owned(batch: Batch, original: Batch) -> Batch:
    """The batch with copies of tensors that share memory with what the loader handed out.

    A list of batches hands out the user's own tensors; writing to them later must not change an
    operator.
    """
    theirs = {t.data_ptr() for t in tensor_leaves((original.x, original.y))}

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.data_ptr() in theirs else tensor

    return replace(batch, x=map_tensors(own, batch.x), y=map_tensors(own, batch.y))


@dataclass
class _PrivateRandomState:
    """A state of the global generators of torch, numpy and Python that only the loader sees.

    Torch's starts from `torch.initial_seed`, so that `torch.manual_seed` decides the shuffling; the
    others have no such function and start as they are. They go on from pass to pass, so that random
    augmentation shows up as a change of the data.
    """

    state: HostRandomState

    def iterate(self, data: Iterable[object]) -> Iterator[object]:
        data = sliced(data)
        # Saving and restoring the states of all generators takes longer than reading a batch.
        inside = self._torch_swapped_in if draws_from_torch_only(data) else self._swapped_in
        with inside():
            iterator = iter(data)
        while True:
            with inside():
                try:
                    raw = next(iterator)
                except StopIteration:
                    return
            yield raw

    @contextmanager
    def _swapped_in(self) -> Iterator[None]:
        outside = HostRandomState.now()
        self.state.restore()
        try:
            yield
        finally:
            self.state = HostRandomState.now()
            outside.restore()

    @contextmanager
    def _torch_swapped_in(self) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.state.of_torch)
        try:
            yield
        finally:
            self.state = replace(self.state, of_torch=torch.get_rng_state())
            torch.set_rng_state(outside)


def _state_seeded(seed: int) -> HostRandomState:
    of_torch = torch.Generator().manual_seed(seed).get_state()
    return replace(HostRandomState.now(), of_torch=of_torch)


class _Fingerprint:
    """A 64-bit hash of a multiset of points, and their number.

    Each point is hashed by a sum of its words with odd weights, mixed by the finaliser of
    splitmix64 (Steele, Lea & Flood 2014) and added up modulo 2^64: any change of one word of one
    point is seen, the order of points and their grouping into batches are not. A tensor without
    dimensions belongs to every point of its batch.
    """

    def __init__(self, *, by_batch: bool = False) -> None:
        self.by_batch = by_batch
        self.num_points = 0
        # One number, on the device of the batches: reading it off would wait for them.
        self._sum = torch.zeros((), dtype=torch.int64, device="cpu")
        self._points = SumOfPoints()

    def add(self, batch: Batch) -> None:
        self.num_points += batch.size
        leaves = list(tensor_leaves((batch.x, batch.y)))
        if any(t.is_meta for t in leaves):
            return
        values = list(plain_leaves((batch.x, batch.y)))
        if values:
            leaves.append(torch.full((), word_of_values(values), device=leaves[0].device))
        self._points.add(leaves, batch.size)
        if self.by_batch:
            self._include(mixed(self._points.taken()))

    def close(self) -> None:
        """Ends a pass: nothing of its points is held any longer but their sum."""
        if not self.by_batch:
            self._include(self._points.taken())
        self._points = SumOfPoints()

    def _include(self, value: Tensor) -> None:
        self._sum = self._sum.to(value.device) + value

    def require_equal(self, other: _Fingerprint) -> None:
        if self.num_points != other.num_points:
            raise DataChangedError(
                f"a pass over dataloader gave {other.num_points} points, the first one "
                f"{self.num_points}: the data must be the same in every pass"
            )
        if self.words() != other.words():
            raise DataChangedError(
                "dataloader gave other data than in the first pass (random augmentation, a sampler "
                "with replacement, drop_last with shuffle, padding that depends on the batch"
                + (", other batches under an averaging that weighs them" if self.by_batch else "")
                + "?): an "
                "operator is applied to the same points every time; freeze what varies, or pass a "
                "list of batches"
            )

    def digest(self) -> str:
        """The number of points and their hash."""
        return _printed(*self.words())

    def words(self) -> tuple[int, int]:
        """The number of points and their hash, a signed number of 64 bits, of a closed pass."""
        return self.num_points, int(self._sum)


def _printed(num_points: int, value: int) -> str:
    return f"{num_points}:{value % 2**64:016x}"


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of length {len(value)}"
    if isinstance(value, Mapping):
        return f"a mapping with keys {list(value)[:8]}"
    return f"a {type(value).__name__}"
