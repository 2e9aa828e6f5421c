"""OrderedBatches: batches whose order is the same in every pass, or an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from hessops.copies import Copyable
from hessops.errors import DataChangedError, DataError
from hessops.influence.description import digest_of_batch, digest_of_description
from hessops.influence.gradients import GradientProvider
from hessops.printed import Node, Printed, counted
from hessops.streaming import Batch, BatchStream, Unpack, known_length

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True)
class Placed:
    """A batch and the number of points before it.

    Attributes:
        start: That number.
        batch: The points.
    """

    start: int
    batch: Batch

    @property
    def points(self) -> slice:
        """The points of the batch among all."""
        return slice(self.start, self.start + self.batch.size)


@dataclass(frozen=True)
class Survey:
    """What one pass over some batches found.

    Attributes:
        sizes: Points by batch.
        digests: A hash of each batch.
    """

    sizes: tuple[int, ...]
    digests: tuple[str, ...]

    @property
    def num_points(self) -> int:
        """Number of points."""
        return sum(self.sizes)

    @property
    def order(self) -> str:
        """A hash of all batches in their order."""
        return digest_of_description(list(self.digests))


class OrderedBatches(Copyable, Printed):
    """The batches of a loader in an order that is the same in every pass.

    The first pass checks every batch (see `Objective.check`) and notes its size and a hash; later
    ones are compared with that.

    Args:
        data: A ``DataLoader``, list of batches or other iterable that can be iterated again.
        provider: Checks the batches, on its device.
        name: What `data` is called in messages.
        unpack: Function from a raw batch to ``(x, y)``; ``None`` expects pairs.
        cache: What may be kept on the device; see `BatchStream`.

    Raises:
        DataError: The loader shuffles.
        ArgumentTypeError, OneShotDataError: See `BatchStream`.

    Example:
        >>> import torch
        >>> from hessops import Objective
        >>> from hessops.influence import GradientProvider
        >>> from hessops.influence.ordered import OrderedBatches
        >>> provider = GradientProvider(Objective(torch.nn.Linear(1, 1), torch.nn.MSELoss()))
        >>> data = [(torch.zeros(3, 1), torch.zeros(3, 1)), (torch.ones(2, 1), torch.zeros(2, 1))]
        >>> [placed.points for placed in OrderedBatches(data, provider, "data")]
        [slice(0, 3, None), slice(3, 5, None)]
    """

    # What the first pass found stays, to compare others with.
    _left_behind = ("_first",)

    def __init__(
        self,
        data: Iterable[object],
        provider: GradientProvider,
        name: str,
        *,
        unpack: Unpack | None = None,
        cache: str | bool | int = False,
    ) -> None:
        _refuse_shuffling(data, name)
        self._stream = BatchStream(data, device=provider.space.device, unpack=unpack, cache=cache)
        self._provider = provider
        self._name = name
        self._survey: Survey | None = None
        self._first: Batch | None = None

    def _node(self) -> Node:
        data = type(self._stream.data).__name__
        if self._survey is None:
            return Node(f"{self._name}: {data}, points not yet counted")
        points = counted(self._survey.num_points, "point")
        batches = counted(len(self._survey.sizes), "batch", "batches")
        return Node(f"{self._name}: {data}, {points} in {batches}")

    def __iter__(self) -> Iterator[Placed]:
        """One pass.

        Raises:
            DataChangedError: The pass gave other batches, or the same in another order.
            HessopsError: From the first pass; see `Objective.check`.
        """
        known, sizes, digests, start = self._survey, [], [], 0
        for position, batch in enumerate(self._stream):
            if known is None:
                self._provider.check(batch)
            if self._first is None:
                self._first = batch
            digest = digest_of_batch(batch)
            if known is not None:
                self._require_same(known, position, digest)
            sizes.append(batch.size)
            digests.append(digest)
            yield Placed(start, batch)
            start += batch.size
        if known is None:
            self._survey = Survey(tuple(sizes), tuple(digests))
        elif len(sizes) != len(known.sizes):
            raise self._changed(len(sizes))

    def _require_same(self, known: Survey, position: int, digest: str) -> None:
        if position >= len(known.digests) or known.digests[position] != digest:
            raise self._changed(position)

    def _changed(self, position: int) -> DataChangedError:
        return DataChangedError(
            f"{self._name} gave another batch {position} than in its first pass: positions of "
            "points mean something only where every pass has the same order; use shuffle=False, a "
            "sampler with a fixed order, or a list of batches"
        )

    def survey(self) -> Survey:
        """What the first pass found; makes it if there was none."""
        if self._survey is None:
            for _ in self:
                pass
        assert self._survey is not None
        return self._survey

    def first(self) -> Batch:
        """The first batch, checked."""
        return next(iter(self)).batch if self._first is None else self._first

    @property
    def num_batches(self) -> int | None:
        """Number of batches, or before the first pass what the loader says of it, if anything."""
        return known_length(self._stream.data) if self._survey is None else len(self._survey.sizes)


def _refuse_shuffling(data: object, name: str) -> None:
    if not isinstance(data, DataLoader):
        return
    sampler = getattr(data.batch_sampler, "sampler", None) or getattr(data, "sampler", None)
    shuffles = isinstance(sampler, _SHUFFLING) or (
        isinstance(sampler, DistributedSampler) and sampler.shuffle
    )
    if shuffles:
        raise DataError(
            f"{name} shuffles ({type(sampler).__name__}): every pass has another order, in which "
            "the positions of points mean nothing; use DataLoader(..., shuffle=False)"
        )
