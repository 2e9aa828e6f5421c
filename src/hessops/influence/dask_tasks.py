"""What the workers of a cluster do: functions of whole chunks."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hessops.errors import ArgumentError
from hessops.influence.converter import ArrayConverter, NumpyArray, TorchNumpyConverter
from hessops.influence.dask_graphs import imported
from hessops.influence.gradients import checked_factors
from hessops.influence.model import InfluenceFunctionModel
from hessops.influence.modes import InfluenceMode
from hessops.influence.storage import ChunkStore, manifest_of
from hessops.isolation import isolated
from hessops.streaming import Batch

# hessops switches state of the whole process, and models are not made for several threads. A
# worker that is a thread of its own beside others in one process has one thread, too.
_ONE_TASK_PER_PROCESS = threading.Lock()


@dataclass(frozen=True)
class Shipment:
    """What every task needs, sent to each worker once.

    Attributes:
        model: A fitted model.
        converter: Between chunks and tensors.
        seed: That of the global generator where the calculator was made: solvers without a
            generator of their own start from it.
    """

    model: InfluenceFunctionModel
    converter: ArrayConverter
    seed: int


@dataclass(frozen=True)
class Delivery:
    """A shipment on a worker.

    Attributes:
        content: What came.
        payload: Its pickled form, which is sent on where another worker asks for it.
    """

    content: Shipment
    payload: bytes

    def __sizeof__(self) -> int:
        """What the scheduler takes for the cost of sending it on."""
        return len(self.payload)

    def __reduce__(self) -> tuple[object, ...]:
        # A worker pickles in one thread what a task works on in another, with hooks in the model.
        return delivered, (self.payload,)

    @contextmanager
    def in_use(self) -> Iterator[Shipment]:
        """The content, for one task at a time.

        Raises:
            ArgumentError: The worker has several threads.
        """
        _require_one_thread()
        with _ONE_TASK_PER_PROCESS, torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(self.content.seed)
            yield self.content

    def batch(self, x: NumpyArray, y: NumpyArray, position: int) -> Batch:
        """The points of a chunk on the model's device."""
        convert = self.content.converter.from_numpy
        batch = Batch.from_raw((convert(x), convert(y)), position=position)
        return batch.to(self.content.model.space.device)

    def checked_batch(self, x: NumpyArray, y: NumpyArray, position: int) -> Batch:
        """As `batch`, after its check.

        Raises:
            HessopsError: See `Objective.check`.
        """
        batch = self.batch(x, y, position)
        self.content.model.gradient_provider.check(batch)
        return batch


def _require_one_thread() -> None:
    try:
        worker = imported("distributed").get_worker()
    except ValueError:  # not on a worker
        return
    require_one_thread_each({worker.address: worker.state.nthreads})


def require_one_thread_each(threads: dict[str, int]) -> None:
    """Raises `ArgumentError` where a worker of some addresses has several threads."""
    several = {address: count for address, count in threads.items() if count != 1}
    if several:
        address, count = next(iter(several.items()))
        raise ArgumentError(
            f"client has workers with several threads ({address} has {count}), expected one each: "
            "torch models are not safe to share among threads; use "
            "LocalCluster(threads_per_worker=1) or dask worker --nthreads 1"
        )


def delivered(payload: bytes) -> Delivery:
    """Unpacks a shipment; a task, so that the scheduler can have it done again."""
    return Delivery(imported("cloudpickle").loads(payload), payload)


def factors_of_chunk(delivery: Delivery, position: int, x: NumpyArray, y: NumpyArray) -> NumpyArray:
    """The factors of the points of a chunk, ``(m, P)``."""
    with delivery.in_use() as content:
        batch = delivery.checked_batch(x, y, position)
        return content.converter.to_numpy(content.model.factors_of(batch))


def check_of_chunk(delivery: Delivery, position: int, x: NumpyArray, y: NumpyArray) -> None:
    """Checks the points of a chunk, once for all the scores of it.

    Raises:
        HessopsError: See `Objective.check`.
    """
    with delivery.in_use():
        delivery.checked_batch(x, y, position)


def scores_of_chunk(
    delivery: Delivery,
    mode: InfluenceMode,
    position: int,
    factors: NumpyArray,
    x: NumpyArray,
    y: NumpyArray,
    _check: None,
) -> NumpyArray:
    """The influences of the points of a chunk, after its check, ``(m, n)`` or with x's shape."""
    with delivery.in_use() as content:
        model, space = content.model, content.model.space
        rows = checked_factors(content.converter.from_numpy(factors), space, "factors")
        batch = delivery.batch(x, y, position)
        with isolated(space.device):
            return content.converter.to_numpy(model.scores_of(rows, batch, mode))


def digest_of_chunk(*arrays: NumpyArray) -> NumpyArray:
    """A hash of the bits of some arrays, ``(1,)``."""
    digest = hashlib.sha256()
    for array in arrays:
        native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
        digest.update(f"{array.shape}|{native.dtype}|".encode())
        digest.update(native.tobytes())
    return np.array([digest.hexdigest()])


def facts_of_worker(delivery: Delivery, x: NumpyArray | None, y: NumpyArray | None) -> NumpyArray:
    """What decides the bytes of results and is the worker's: versions, threads, losses; ``(1,)``.

    Args:
        delivery: The model.
        x: Inputs of the first training points.
        y: Their targets.
    """
    with delivery.in_use() as content:
        first = None if x is None or y is None else delivery.batch(x, y, 0)
        manifest = manifest_of(content.model, {}, first)
        facts = np.empty(1, dtype=object)
        facts[0] = {key: manifest[key] for key in ("device", "losses", "threads", "versions")}
        return facts


def written(store: ChunkStore, place: tuple[int, int], chunk: NumpyArray) -> None:
    """Writes a chunk, whole or not at all."""
    store.write(place, TorchNumpyConverter().from_numpy(chunk))


def resolved(path: str | Path) -> Path:
    """A path that is the same for workers that were started in another directory."""
    return Path(path).expanduser().resolve()
