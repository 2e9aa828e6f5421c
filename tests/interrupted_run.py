"""Writes influences to a store, and kills itself on the way; run by test_influence_calculators.

usage: python interrupted_run.py OUTPUT SEED

Every run is a forked process. The reference runs to its end. The others share one store: the k-th
one is killed with SIGKILL when it comes to an event that was drawn for it, where an event is the
middle of the writing of a file or the moment after it. A last one runs to its end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from hessops import NystroemPreconditioner
from hessops.influence import CgInfluence, SequentialInfluenceCalculator

torch.set_num_threads(1)


def calculator() -> SequentialInfluenceCalculator:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(60, 6), torch.randint(3, (60,))
    influence = CgInfluence(
        model,
        nn.CrossEntropyLoss(),
        1e-2,
        "layer_wise",
        "generalized_gauss_newton",
        preconditioner=NystroemPreconditioner(rank=5),
        use_block_cg=True,
    )
    return SequentialInfluenceCalculator(influence.fit([(x, y)]))


def collections() -> tuple[list[tuple[torch.Tensor, ...]], list[tuple[torch.Tensor, ...]]]:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(50, 6, generator=generator), torch.randint(3, (50,), generator=generator)
    test = list(zip(x[:11].split([4, 4, 3]), y[:11].split([4, 4, 3]), strict=True))
    train = list(
        zip(x[11:].split([9, 2, 9, 9, 9, 1]), y[11:].split([9, 2, 9, 9, 9, 1]), strict=True)
    )
    return test, train


def write(path: Path, mode: str) -> None:
    test, train = collections()
    lazy = calculator().influences(test, train, mode=mode)
    lazy.to_zarr(path, row_chunk=3, column_chunk=7)


def kill_at(event: int) -> None:
    """Kills this process at an event; files are whole once `Path.replace` has given them a name."""
    replace, seen = Path.replace, [0]

    def counted(self: Path, target: Path) -> Path:
        for happens in (lambda: None, lambda: replace(self, target)):
            happens()
            seen[0] += 1
            if seen[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)
        return Path(target)

    Path.replace = counted


def in_a_process(path: Path, mode: str, event: int | None) -> int:
    """The exit status of a run, negative for a signal."""
    child = os.fork()
    if child == 0:
        if event is not None:
            kill_at(event)
        status = 1
        try:
            write(path, mode)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tree(path: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()
    }


def main(output: Path, seed: int, mode: str) -> None:
    draw = random.Random(seed)
    assert in_a_process(output / "whole", mode, None) == 0
    whole = tree(output / "whole")
    # The first kills are at the very beginning: the manifest and the description of the array.
    events = [1, 2, 3, 4, *(draw.randint(1, 7) for _ in range(12))]
    statuses, held = [], []
    for event in events:
        statuses.append(in_a_process(output / "killed", mode, event))
        held.append(sum("c/" in name for name in tree(output / "killed")))
        if statuses[-1] == 0:
            break
    last = in_a_process(output / "killed", mode, None)
    print(
        json.dumps(
            {
                "kills": sum(status == -signal.SIGKILL for status in statuses),
                "others": [s for s in statuses if s not in (0, -signal.SIGKILL)],
                "last": last,
                "held": held,
                "files": len(whole),
                "same": tree(output / "killed") == whole,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
