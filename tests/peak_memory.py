"""Prints the peak memory of writing influences for some numbers of training points.

usage: python peak_memory.py OUTPUT COUNT [COUNT ...]

Each run is a forked process; the data are made when they are asked for, so that a run that holds on
to them shows it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hessops.influence import DirectInfluence, SequentialInfluenceCalculator

torch.set_num_threads(1)
WIDTH = 4000  # numbers in an input


class Made(Dataset[tuple[Tensor, Tensor]]):
    """Points that are made anew whenever they are asked for, the same ones every time."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.full((WIDTH,), float(index)).cos()
        return x, x[:1]


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(len(x), 8, -1).mean(dim=2))


def run(output: Path, count: int) -> None:
    influence = DirectInfluence(Pooled(), nn.MSELoss(), 0.1)
    influence.fit(DataLoader(Made(64), batch_size=32))
    calculator = SequentialInfluenceCalculator(influence)
    train = DataLoader(Made(count), batch_size=32)
    lazy = calculator.influences(DataLoader(Made(8), batch_size=4), train)
    lazy.to_zarr(output / str(count), column_chunk=256)
    lazy.top_k(3)


def peak(output: Path, count: int) -> int:
    """Kibibytes."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        status = 1
        try:
            run(output, count)
            usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(writing, str(usage).encode())
            status = 0
        finally:
            os._exit(status)
    os.wait()
    return int(os.read(reading, 64).decode() or 0)


if __name__ == "__main__":
    counts = [int(count) for count in sys.argv[2:]]
    print(json.dumps([peak(Path(sys.argv[1]), count) for count in counts]))
