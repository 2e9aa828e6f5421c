"""Processes: who holds the points of an average, one process or many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hessops.errors import DistributedError

# What must be the same in all processes, by a name for messages: 64-bit hashes, as numbers or as
# int64 tensors of no dimension.
Same = Mapping[str, Callable[[], "int | Tensor"]]


class Processes(ABC):
    """The processes that hold the points of an average between them, and work in step.

    What is decided from a sum over all of them is decided alike by each. Where one raises an error
    inside any of the methods, all do.
    """

    @property
    @abstractmethod
    def rank(self) -> int:
        """The number of this process, from 0."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many there are."""

    @abstractmethod
    def gathered(self, words: Callable[[], Sequence[int]], count: int) -> list[list[int]]:
        """What each process computes, in the order of the ranks.

        Args:
            words: Computes `count` signed integers of 64 bits.
            count: How many.

        Raises:
            DistributedError: Another process raised an error, or is gone.
        """

    @abstractmethod
    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """The tensor of one process, in all; the others give one of its shape and dtype."""

    @abstractmethod
    def owners(self, costs: Sequence[float]) -> list[int]:
        """Which process does each of some tasks, so that all have about the same to do."""

    @abstractmethod
    def generator(self, source: torch.Generator) -> torch.Generator:
        """What a process draws from for its own points, independently of all others."""

    def require_equal(self, name: str, word: Callable[[], int]) -> None:
        """Raises `DistributedError` where a 64-bit hash differs between processes."""
        words = self.gathered(lambda: [word()], 1)
        others = [rank for rank, other in enumerate(words) if other != words[0]]
        if others:
            raise DistributedError(
                f"{name} differ between processes: ranks {others} have others than rank 0"
            )

    def require_shard(self, data: object) -> None:  # noqa: B027  # one process has all the data
        """Raises `DataError` where a loader repeats points to make all shards equally long."""

    def plan_of(self, data: object) -> int:
        """A hash of how a loader splits the points among processes, where it tells."""
        return 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """A stretch of work after which all processes go on, or all raise.

        Raises:
            DistributedError: Another process raised an error inside, or is gone.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised

        def failed() -> Sequence[int]:
            if error is not None:
                raise error
            return ()

        self.gathered(failed, 0)


class OneProcess(Processes):
    """This process alone.

    Example:
        >>> from hessops.processes import ONE_PROCESS
        >>> ONE_PROCESS.rank, ONE_PROCESS.size
        (0, 1)
        >>> ONE_PROCESS.gathered(lambda: [3, 4], 2)
        [[3, 4]]
    """

    rank = 0
    size = 1

    def gathered(self, words: Callable[[], Sequence[int]], count: int) -> list[list[int]]:
        """What it computes."""
        return [list(words())]

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """The tensor itself."""
        return tensor

    def owners(self, costs: Sequence[float]) -> list[int]:
        """This one does all of them."""
        return [0] * len(costs)

    def generator(self, source: torch.Generator) -> torch.Generator:
        """The source itself."""
        return source

    @contextmanager
    def together(self) -> Iterator[None]:
        """As it is."""
        yield


ONE_PROCESS = OneProcess()


def spread(costs: Sequence[float], size: int) -> list[int]:
    """Which of `size` workers does each task: the dearest first, each to the one with least to do.

    The longest is at most 4/3 - 1/(3·size) of the best (Graham 1969).

    Example:
        >>> from hessops.processes import spread
        >>> spread([1.0, 8.0, 4.0, 5.0], 2)
        [0, 0, 1, 1]
    """
    loads, owners = [0.0] * size, [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda t: (-costs[t], t)):
        least = loads.index(min(loads))
        owners[task] = least
        loads[least] += costs[task]
    return owners
