"""Prints what is estimated and what is measured of the memory of each stage, in MiB.

Linux only. Each stage is a forked process whose peak is counted from the stage on.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from hessops.influence import (
    CgInfluence,
    InfluenceFunctionModel,
    NystroemSketchInfluence,
    SequentialInfluenceCalculator,
)

torch.set_num_threads(1)
Loader = list[tuple[torch.Tensor, torch.Tensor]]
GGN = "generalized_gauss_newton"


def peak() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def measured(stage: Callable[[], object]) -> float:
    reading, writing = os.pipe()
    if os.fork() == 0:
        code = 1
        try:
            Path("/proc/self/clear_refs").write_text("5")
            before = peak()
            stage()
            os.write(writing, str(peak() - before).encode())
            code = 0
        finally:
            os._exit(code)
    os.wait()
    return float(os.read(reading, 64).decode())


def compared(
    influence: InfluenceFunctionModel, test: Loader, train: Loader
) -> dict[str, tuple[float, float]]:
    calculator = SequentialInfluenceCalculator(influence)
    estimate = calculator.estimate_memory(test, train, "perturbation")
    provider = influence.gradient_provider
    points, batch = provider.batch(*test[0]), provider.batch(*train[0])
    rows = provider.rows(points)
    stages: dict[str, Callable[[], object]] = {
        "gradients": lambda: provider.rows(points),
        "factors": lambda: influence.inverse.apply(rows),
        "scores": lambda: provider.mixed_products(batch, rows),
    }
    return {
        name: (getattr(estimate, name) / 2**20, measured(stage)) for name, stage in stages.items()
    }


def main() -> None:
    model = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU())
    model.append(nn.Linear(400, 10))
    x, y = torch.randn(256, 784), torch.randint(10, (256,))
    loss, train, test = nn.CrossEntropyLoss(), [(x, y)], [(x[:32], y[:32])]
    models = {
        "cg": CgInfluence(model, loss, 0.1, "full", GGN, maxiter=2, warn_on_max_iteration=False),
        "nystroem": NystroemSketchInfluence(model, loss, 0.1, "full", GGN, rank=20),
    }
    print(json.dumps({name: compared(m.fit(train), test, train) for name, m in models.items()}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    main()
