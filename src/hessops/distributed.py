"""Averages over the processes of a torch.distributed group, each with a shard of the data."""

from __future__ import annotations

import platform
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from datetime import timedelta
from math import prod
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset

from hessops.batch.averaging import NOTHING, Averaging, PointAveraging, Summand
from hessops.copies import Copyable
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    DistributedError,
    RemoteError,
    ShapeError,
)
from hessops.functional.precision import accumulation_dtype
from hessops.hashing import word_of_values
from hessops.printed import Node
from hessops.processes import Processes, Same, spread

__all__ = ["DistributedAveraging", "gather", "shard", "together"]

# Adds to a tensor of zeros what a process has, and returns the weight of that.
Fill = Callable[[Tensor], float]

# Hashes travel as pieces of so many bits, which float32 holds exactly.
PIECE_BITS, PIECES = 20, 3
# After this long, a process that waits for others looks whether one of them has given up.
PATIENCE = timedelta(seconds=1)
MESSAGE_BYTES = 1024
# What each process adds in front of the hashes: its weight in two parts, and whether it failed.
HEAD = 3


class DistributedAveraging(Averaging):
    r"""A weighted mean over the batches of all processes of a group, :math:`\sum w v / \sum w`.

    Given to any operator as ``averaging=``, where every process holds the same model and a shard of
    the data: its products, and all that is built from them, are those with all the data, and equal
    to the last bit in all processes. Shards may be of any size, and empty.

    Every application is one all-reduce, of :math:`\sum_b w_b v_b` together with a few numbers of
    each process: :math:`\sum_b w_b`, whether an error was raised, and hashes of what must be the
    same everywhere (right-hand sides, parameters, buffers, loss, the kind of operator, threads and
    versions). So an error in one process is one in all, and processes that went apart are told so
    instead of being averaged.

    Every process calls the same methods in the same order, with the same arguments apart from the
    data.

    Args:
        averaging: The weights of batches; ``None`` is ``PointAveraging()``.
        group: A process group; ``None`` is the default one.

    Raises:
        ArgumentTypeError: `averaging` is no `Averaging`, is a `DistributedAveraging`, or has a
            ``reduce`` of its own.
        DistributedError: There is no process group, or this process is not in it.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from hessops import DistributedAveraging, HessianOperator
        >>> from hessops.distributed import shard
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> points = torch.utils.data.TensorDataset(torch.ones(3, 1), torch.zeros(3, 1))
        >>> loader = torch.utils.data.DataLoader(shard(points), batch_size=2)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> averaging = DistributedAveraging()
        >>> H = HessianOperator(model, torch.nn.MSELoss(), loader, averaging=averaging)
        >>> H.apply(torch.ones(1))
        tensor([2.])
        >>> averaging
        DistributedAveraging(PointAveraging(), rank 0 of 1)
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        averaging: Averaging | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        averaging = PointAveraging() if averaging is None else averaging
        if not isinstance(averaging, Averaging) or isinstance(averaging, DistributedAveraging):
            raise ArgumentTypeError(
                f"averaging must be an Averaging of batches within a process, got {averaging!r}"
            )
        if type(averaging).reduce is not Averaging.reduce:
            raise ArgumentTypeError(
                f"{type(averaging).__name__} has a reduce of its own, which cannot be split among "
                "processes: define weight(num_points)"
            )
        self._averaging = averaging
        self._processes = GroupOfProcesses(group)

    @property
    def depends_on_batches(self) -> bool:  # type: ignore[override]  # as the inner one says
        """Whether results depend on how the points are split into batches."""
        return self._averaging.depends_on_batches

    @property
    def processes(self) -> Processes:
        """The processes of the group."""
        return self._processes

    @property
    def within_process(self) -> Averaging:
        """The weights, without the processes."""
        return self._averaging

    def by_points(self) -> Averaging:
        """The mean over points of the same processes."""
        return DistributedAveraging(PointAveraging(), self._processes.group)

    def weight(self, num_points: int) -> float:
        """As of the averaging that was given."""
        return self._averaging.weight(num_points)

    def reduce(
        self,
        values: Iterable[tuple[Tensor | Summand, int]],
        like: Tensor | None = None,
        same: Same = NOTHING,
    ) -> Tensor:
        """The weighted mean over all processes; see `Averaging.reduce`.

        Raises:
            DataError: There are no values in any process, or their weights sum to zero.
            DistributedError: Another process raised an error, is gone, or has other values of
                `same`.
            HessopsError: As of `Averaging.reduce`, where it is this process that fails.
        """
        if like is None:
            raise ArgumentError(
                "like is needed: a process without data does not know the shape of the others"
            )
        total, weight = self._processes.total(
            lambda total: self._averaging.add_to(total, values),
            like.shape,
            accumulation_dtype(like.dtype),
            like.device,
            same,
        )
        if weight == 0:
            raise DataError(
                f"there is nothing to average: the data are empty in all {self._processes.size} "
                "processes, or their weights are zero"
            )
        return total.div_(weight).to(like.dtype)

    def _node(self) -> Node:
        try:
            place = f"rank {self._processes.rank} of {self._processes.size}"
        except DistributedError:
            place = "group destroyed"
        return Node(f"DistributedAveraging({self._averaging!r}, {place})")


class GroupOfProcesses(Processes, Copyable):
    """The processes of a torch.distributed group.

    Args:
        group: ``None`` is the default one.

    Raises:
        DistributedError: There is none, or this process is not in it.
    """

    _names_of_parts: ClassVar[Mapping[str, str]] = {"_reference": "group"}

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise DistributedError(
                "there is no process group: call torch.distributed.init_process_group first, in a "
                "script that torchrun starts"
            )
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise DistributedError(
                f"this process is not in the group it was given ({group!r}), so that it cannot "
                "average with it"
            )
        world = dist.group.WORLD
        assert world is not None
        # Weakly, as torch keeps a group until it is destroyed: one that is held for longer, by an
        # operator in a global variable, may abort its process at exit (std::terminate in gloo).
        self._reference = weakref.ref(world if group is None else group)

    @property
    def group(self) -> dist.ProcessGroup:
        """The group.

        Raises:
            DistributedError: It was destroyed.
        """
        group = self._reference()
        if group is None:
            raise DistributedError(
                "the process group was destroyed: call torch.distributed.destroy_process_group "
                "after the last product, and make operators anew for another group"
            )
        return group

    def __deepcopy__(self, memo: object) -> Self:
        """Itself: there is one such group in a process."""
        return self

    @property
    def rank(self) -> int:
        """The number of this process within the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many processes are in the group."""
        return dist.get_world_size(self.group)

    # --- sums -----------------------------------------------------------------------------

    def total(
        self,
        fill: Fill,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        same: Same,
    ) -> tuple[Tensor, float]:
        """The sum over processes of what each has, and of its weight, by one all-reduce.

        Args:
            fill: Adds to a tensor of zeros what this process has, and returns its weight.
            shape: Of that tensor.
            dtype: Of that tensor.
            device: Of that tensor.
            same: What must be equal in all processes.

        Raises:
            DistributedError: Another process raised an error, is gone, or has other values of
                `same`.
        """
        # What each process says for itself has a place of its own, where all others add zero.
        same = {**same, "threads, device or version of torch": lambda: _route(device)}
        count = prod(shape)
        buffer = torch.zeros(
            count + self.size * (HEAD + PIECES * len(same)), dtype=dtype, device=device
        )
        total, heads = buffer[:count].view(tuple(shape)), buffer[count:].view(self.size, -1)
        error: Exception | None = None
        try:
            weight = fill(total)
            head = _head(weight, same, heads)
        except Exception as raised:
            error = raised
            heads[self.rank, HEAD - 1] = 1
        else:
            heads[self.rank] = head
        self._all_reduce(buffer)
        # In float64, so that nothing is lost of a weight.
        told = heads.double().tolist()
        failed = [rank for rank, head in enumerate(told) if head[HEAD - 1]]
        if failed:
            self._raise(error, failed)
        self._require_same(told, list(same))
        return total, sum(head[0] + head[1] for head in told)

    def gathered(self, words: Callable[[], Sequence[int]], count: int) -> list[list[int]]:
        """See `Processes.gathered`."""
        table = torch.zeros(self.size, 1 + count, dtype=torch.int64, device=self._device)
        error: Exception | None = None
        try:
            table[self.rank, 1:] = torch.tensor([*words()], dtype=torch.int64)
        except Exception as raised:
            error = raised
            table[self.rank, 0] = 1
        self._all_reduce(table)
        told: list[list[int]] = table.tolist()
        failed = [rank for rank, row in enumerate(told) if row[0]]
        if failed:
            self._raise(error, failed)
        return [row[1:] for row in told]

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """See `Processes.broadcast`."""
        if self.size == 1:
            return tensor
        # Contiguous everywhere: products with other strides may be rounded otherwise.
        tensor = tensor.contiguous() if source == self.rank else tensor.new_empty(tensor.shape)
        self._run(dist.broadcast, tensor, src=dist.get_global_rank(self.group, source))
        return tensor

    def collected(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of one shape of all processes, in the order of the ranks."""
        # As bytes: backends do not know every dtype.
        sent = tensor.contiguous().reshape(-1).view(torch.uint8)
        received = tensor.new_empty(self.size, *tensor.shape)
        parts = [part.reshape(-1).view(torch.uint8) for part in received]
        self._run(lambda into, **kwargs: dist.all_gather(into, sent, **kwargs), parts)
        return [*received]

    def owners(self, costs: Sequence[float]) -> list[int]:
        """See `Processes.owners`."""
        return spread(costs, self.size)

    def generator(self, source: torch.Generator) -> torch.Generator:
        """See `Processes.generator`; every process draws one number from its source."""
        if self.size == 1:
            return source
        drawn = int(torch.randint(2**62, (), generator=source, device=source.device))
        seed = word_of_values([drawn, self.rank])
        return torch.Generator(device=source.device).manual_seed(seed % 2**63)

    # --- failures -------------------------------------------------------------------------

    def _raise(self, own: Exception | None, failed: Sequence[int]) -> None:
        """Raises the error of this process, or tells of those of others."""
        text = "" if own is None else _text_of(own)
        mine = torch.zeros(self.size, MESSAGE_BYTES, dtype=torch.uint8, device=self._device)
        encoded = text.encode(errors="backslashreplace")[:MESSAGE_BYTES]
        mine[self.rank, : len(encoded)] = torch.tensor([*encoded], dtype=torch.uint8)
        self._all_reduce(mine)
        texts = {
            rank: bytes(mine[rank].tolist()).rstrip(b"\0").decode(errors="ignore")
            for rank in failed
        }
        if own is not None:
            own.add_note(f"(raised in rank {self.rank} of {self.size}; failed: ranks {failed})")
            raise own
        raise RemoteError(
            "; ".join(f"rank {rank} of {self.size} raised {texts[rank]}" for rank in failed)
        )

    def _require_same(self, told: Sequence[Sequence[float]], names: Sequence[str]) -> None:
        for place, name in enumerate(names):
            start = HEAD + PIECES * place
            values = [head[start : start + PIECES] for head in told]
            others = [rank for rank, value in enumerate(values) if value != values[0]]
            if others:
                raise DistributedError(
                    f"{name} differ between processes: ranks {others} have others than rank 0, and "
                    f"the sum would mean nothing. {_REMEDIES.get(name, '')}".rstrip()
                )

    def _all_reduce(self, tensor: Tensor) -> None:
        self._run(dist.all_reduce, tensor)

    def _run(self, collective: Callable[..., Any], tensor: Any, **kwargs: object) -> None:
        """Runs a collective operation to its end.

        Raises:
            DistributedError: It fails, as when a process is gone.
        """
        try:
            work = collective(tensor, group=self.group, async_op=True, **kwargs)
            self._wait(work, tensor)
        except RuntimeError as error:
            if isinstance(error, DistributedError):
                raise
            self._give_up()
            raise DistributedError(
                f"rank {self.rank} of {self.size} cannot reach the other processes: {error} One of "
                "them is gone, or waits for something else than this one; see what it said. The "
                "group cannot be used any more"
            ) from error

    def _wait(self, work: dist.Work, tensor: Any) -> None:
        first = tensor if isinstance(tensor, Tensor) else tensor[0]
        if first.device.type != "cpu":
            work.wait()
            return
        # A process may wait for one that is alive but has given up, since a third one is gone.
        while True:
            started = time.monotonic()
            try:
                work.wait(PATIENCE)
            except RuntimeError:
                waited = time.monotonic() - started
                if work.is_completed() or waited < PATIENCE.total_seconds() / 2:
                    raise
                if self._has_given_up():
                    raise
            else:
                return

    @property
    def _note(self) -> str:
        return f"hessops: given up in {self.group.group_name}"

    def _store(self) -> Any:
        """Where the processes of a group met and can leave notes; ``None`` where torch hides it."""
        find = getattr(dist.distributed_c10d, "_get_process_group_store", None)
        return None if find is None else find(self.group)

    def _give_up(self) -> None:
        with suppress(Exception):  # the process that keeps the store may be the one that is gone
            self._store().set(self._note, str(self.rank))

    def _has_given_up(self) -> bool:
        store = self._store()
        try:
            return store is not None and bool(store.check([self._note]))
        except Exception:  # the store is gone, with the process that kept it
            return True

    @property
    def _device(self) -> torch.device:
        """Where small messages are, for which the group has a backend."""
        config = dist.get_backend_config(self.group)
        if "cpu:" in config or "cuda:" not in config:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    # --- data -----------------------------------------------------------------------------

    def require_shard(self, data: object) -> None:
        """See `Processes.require_shard`."""
        sampler = _distributed_sampler(data)
        if sampler is None:
            return
        if (sampler.num_replicas, sampler.rank) != (self.size, self.rank):
            raise DataError(
                f"the DistributedSampler of dataloader gives the points of rank {sampler.rank} of "
                f"{sampler.num_replicas}, but this is rank {self.rank} of {self.size}: points "
                "would be counted twice or never"
            )
        count = len(sampler.dataset)  # type: ignore[arg-type]  # it has taken its length too
        if sampler.total_size > count:
            raise DataError(
                f"the DistributedSampler of dataloader repeats {sampler.total_size - count} of "
                f"{count} points, so that all {self.size} shards are equally long, and they would "
                "be counted twice: use DataLoader(hessops.distributed.shard(dataset), ...) "
                "without a sampler"
            )

    def plan_of(self, data: object) -> int:
        """See `Processes.plan_of`."""
        sampler = _distributed_sampler(data)
        if sampler is None:
            return 0
        return word_of_values(
            [sampler.seed, sampler.epoch, sampler.shuffle, sampler.drop_last, sampler.total_size]
        )


def _text_of(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # an error that cannot say what it is
        return type(error).__name__


def _route(device: torch.device) -> int:
    """What decides how the same numbers are rounded, and with it what a solver does next."""
    return word_of_values(
        [torch.get_num_threads(), torch.__version__, device.type, platform.machine()]
    )


_REMEDIES: Mapping[str, str] = {
    "right-hand sides": (
        "Random ones are drawn from generators that must be seeded alike: call torch.manual_seed "
        "with the same number in all processes, or pass generators. Where they come from a solver, "
        "so do its arguments: a regularization or a first guess may differ."
    ),
    "parameters, buffers or loss": (
        "Load the same weights and buffers (running means too) in all processes, or broadcast "
        "those of rank 0."
    ),
    "threads, device or version of torch": (
        "Equal sums need equal ways: call torch.set_num_threads with the same number."
    ),
    "samplers": "Call set_epoch with the same number in all processes.",
    "operators": "All processes make the same operators and apply them in the same order.",
}


def _head(weight: float, same: Same, heads: Tensor) -> Tensor:
    """What a process says for itself: its weight in two parts, no error, and its hashes."""
    rounded = torch.tensor(weight, dtype=heads.dtype).item()
    head = heads.new_zeros(heads.shape[1])
    head[0], head[1] = rounded, weight - rounded
    for place, value in enumerate(same.values()):
        word = torch.as_tensor(value(), dtype=torch.int64, device=heads.device)
        for piece in range(PIECES):
            bits = (word >> (PIECE_BITS * piece)) & (2**PIECE_BITS - 1)
            head[HEAD + PIECES * place + piece] = bits
    return head


def _distributed_sampler(data: object) -> DistributedSampler[object] | None:
    if not isinstance(data, DataLoader):
        return None
    for sampler in (data.sampler, getattr(data.batch_sampler, "sampler", None), data.batch_sampler):
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None


# --- data and results -------------------------------------------------------------------------


def shard(dataset: Dataset[Any], group: dist.ProcessGroup | None = None) -> Subset[Any]:
    """The part of a dataset that is this process's: consecutive points, none of them twice.

    Rank r of R has the points from ⌊r·N/R⌋ to ⌊(r+1)·N/R⌋, so that shards differ by one point at
    most and may be empty, and what ranks compute for their points is in order when it is joined in
    the order of the ranks (`gather`).

    Args:
        dataset: N points, with ``len`` and access by position.
        group: ``None`` is the default process group.

    Raises:
        ArgumentTypeError: `dataset` has no length, or no access by position.
        DistributedError: There is no process group.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from hessops.distributed import shard
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> len(shard(torch.utils.data.TensorDataset(torch.arange(5))))  # 2 and 3 of two ranks
        5
        >>> dist.destroy_process_group()
    """
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise ArgumentTypeError(
            f"dataset must have a length and access by position, got {type(dataset).__name__}; "
            "let an iterable dataset give other points in each process"
        )
    if isinstance(dataset, DataLoader):
        raise ArgumentTypeError(
            "dataset is a DataLoader: shard its dataset, and make a DataLoader of the shard"
        )
    processes = GroupOfProcesses(group)
    rank, size, count = processes.rank, processes.size, len(dataset)
    return Subset(dataset, range(rank * count // size, (rank + 1) * count // size))


def gather(tensor: Tensor, dim: int = 0, group: dist.ProcessGroup | None = None) -> Tensor:
    """The tensors of all processes, joined in the order of the ranks; the same in all of them.

    Args:
        tensor: This process's; along `dim` it may be shorter or longer than the others.
        dim: The dimension along which they are joined.
        group: ``None`` is the default process group.

    Returns:
        A new tensor of their dtype, without a graph. Along `dim` it is as long as all together.

    Raises:
        ShapeError: They differ in dtype or in another dimension, or have no dimension `dim`.
        DistributedError: A process is gone, or there is no process group.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from hessops.distributed import gather
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> gather(torch.zeros(2, 3), dim=1).shape  # (2, 3·R) of R ranks with as many each
        torch.Size([2, 3])
        >>> dist.destroy_process_group()
    """
    processes = GroupOfProcesses(group)

    def kind() -> list[int]:
        if not tensor.ndim or not -tensor.ndim <= dim < tensor.ndim:
            raise ShapeError(f"dim is {dim}, but tensor has shape {tuple(tensor.shape)}")
        shape = list(tensor.shape)
        length = shape.pop(dim)
        return [length, word_of_values([shape, str(tensor.dtype)])]

    kinds = processes.gathered(kind, 2)
    if len({fixed for _, fixed in kinds}) > 1:
        raise ShapeError(
            f"tensor has shape {tuple(tensor.shape)} and dtype {tensor.dtype} in rank "
            f"{processes.rank}; other ranks have another dtype, or shape beside dimension {dim}"
        )
    lengths = [length for length, _ in kinds]
    moved = tensor.detach().movedim(dim, 0)
    padded = moved.new_zeros(max(lengths), *moved.shape[1:])
    padded[: len(moved)] = moved
    parts = processes.collected(padded)
    joined = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    return joined.movedim(0, dim).contiguous()


@contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """A stretch of work after which all processes go on, or all raise.

    For work on a shard between what operators do, such as scoring its points: without it, an error
    in one process leaves the others waiting for it.

    Args:
        group: ``None`` is the default process group.

    Raises:
        RemoteError: Another process raised an error inside.
        DistributedError: A process is gone.

    Example:
        >>> import torch.distributed as dist
        >>> from hessops.distributed import together
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> with together():
        ...     score = 1 + 1
        >>> dist.destroy_process_group()
    """
    with GroupOfProcesses(group).together():
        yield
