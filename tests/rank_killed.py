"""A rank that is killed in the middle of a solve, and what becomes of the others.

``python rank_killed.py RANK SIZE STORE RESULTS VICTIM`` writes what the rank was told, and when.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from rank_checks import LOSS, REGULARIZATION, Breaking, join_group, network, points, vectors
from torch import Tensor
from torch.utils.data import DataLoader

from hessops import CgOperator, DistributedAveraging, GaussNewtonOperator

PATIENCE = 60


class Deadly(Breaking):
    """Kills its process when it is read for the last time."""

    def __init__(self, x: Tensor, y: Tensor, reads: int | None) -> None:
        super().__init__(x, y, None)
        self.reads = reads

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.reads is not None:
            self.reads -= 1
            if self.reads == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def main() -> None:
    rank, size, store, results, victim = (int(a) if a.isdigit() else a for a in sys.argv[1:])
    join_group(rank, size, store, timedelta(minutes=30))
    x, y = points()
    data = Deadly(x, y, 100 if rank == victim else None)
    matrix = GaussNewtonOperator(
        network(),
        LOSS,
        DataLoader(data, batch_size=4),
        averaging=DistributedAveraging(),
        cache=False,
    )
    started, told = time.monotonic(), ""
    try:
        CgOperator(matrix, REGULARIZATION).solve(vectors(2, matrix.input_size))
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - started
    Path(results).write_text(json.dumps({"told": told, "seconds": seconds}))
    # It stays, so that nobody is told by its end.
    others = [Path(results).with_name(f"{other}.json") for other in range(size) if other != victim]
    while not all(path.exists() for path in others) and time.monotonic() - started < PATIENCE:
        time.sleep(0.05)
    os._exit(0)


if __name__ == "__main__":
    main()
