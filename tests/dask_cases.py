"""Points in ragged chunks, and influence models that tell where they work, wait and kill."""

from __future__ import annotations

import hashlib
import os
import signal
import time
import uuid
from pathlib import Path
from typing import Self

import torch
from influence_cases import Problem
from torch import Tensor, nn

from hessops.influence import DaskInfluenceCalculator, DirectInfluence, TorchNumpyConverter

LAMBDA = 1e-3
TEST_CHUNKS = (4, 1, 3)
TRAIN_CHUNKS = (5, 1, 5, 2)


def chunked(tensor: Tensor, sizes: tuple[int, ...]):
    """A dask array of the rows of a tensor."""
    import dask.array as da

    return da.from_array(tensor.numpy(), chunks=(sizes, *((n,) for n in tensor.shape[1:])))


class Points:
    """The points of a problem in ragged chunks."""

    def __init__(self) -> None:
        self.problem = p = Problem(num_train=13, num_test=8)
        self.test = chunked(p.x_test, TEST_CHUNKS), chunked(p.y_test, TEST_CHUNKS)
        self.train = chunked(p.x, TRAIN_CHUNKS), chunked(p.y, TRAIN_CHUNKS)

    def loaders(self) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        p = self.problem
        tests = zip(p.x_test.split(TEST_CHUNKS), p.y_test.split(TEST_CHUNKS), strict=True)
        return list(tests), p.batches(TRAIN_CHUNKS)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return self.problem.batches((6, 7))


class Marking(DirectInfluence):
    """Leaves a file for each thing it does: what, for which points, in which process."""

    marks: Path

    @classmethod
    def of(cls, points: Points, marks: Path) -> Self:
        p = points.problem
        model = cls(p.model, p.loss, LAMBDA)
        model.marks = marks
        return model.fit(points.batches())

    def _settings_in_full(self) -> dict[str, object]:
        settings = super()._settings_in_full()
        return {key: value for key, value in settings.items() if key not in ("marks", "kill_at")}

    def mark(self, what: str, *about: object) -> None:
        name = "_".join(map(str, (what, *about, os.getpid(), uuid.uuid4().hex)))
        (self.marks / name).touch()

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if hasattr(self, "marks"):
            self.mark("unpickled")

    def factors_of(self, batch) -> Tensor:
        self.mark("factors", batch.position)
        return super().factors_of(batch)

    def scores_of(self, factors, batch, mode) -> Tensor:
        row = hashlib.sha256(factors.numpy().tobytes()).hexdigest()[:8]
        self.before_scores()
        self.mark("scores", row, batch.position)
        return super().scores_of(factors, batch, mode)

    def before_scores(self) -> None:
        """What happens before each computation of scores."""

    def count_here(self, what: str) -> int:
        return len(list(self.marks.glob(f"{what}_*_{os.getpid()}_*")))


class Waiting(Marking):
    """Before its third scores in a process it waits for the file `go`."""

    def before_scores(self) -> None:
        if self.count_here("scores") == 2 and not (self.marks / "go").exists():
            self.mark("waiting")
            deadline = time.monotonic() + 60
            while not (self.marks / "go").exists() and time.monotonic() < deadline:
                time.sleep(0.02)


class Killing(Marking):
    """Kills its process before the scores of a number."""

    kill_at: int

    def before_scores(self) -> None:
        if self.count_here("scores") == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def wide_model(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()


def run_that_is_killed(output: Path, marks: Path, kill_at: int) -> None:
    """Influences to a store, on a cluster within this process."""
    from distributed import Client

    torch.set_num_threads(1)
    points = Points()
    model = Killing.of(points, marks)
    model.kill_at = kill_at
    inside = {"processes": False, "n_workers": 1, "threads_per_worker": 1}
    with Client(**inside, dashboard_address=":0") as client:
        calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
        calculator.to_zarr(calculator.influences(*points.test, *points.train), output)
