"""How many vectors should share one pass backward, and what the rule of the library gives away.

What is measured, and what the tables show, is in `DESCRIPTION`.

    python benchmarks/columns.py [--quick] [--rounds 5] [--threads 1]
"""

from __future__ import annotations

from functools import partial

import torch
from _cases import CLASSES, Encoder, perceptron, small_convolutional
from _harness import Call, Report, run, seconds
from torch import Tensor, nn

from hessops import BatchOperator, GeneralizedGaussNewtonBatchOperation, HessianBatchOperation
from hessops.functional.columns import columns_that_fit

DESCRIPTION = """\
Time of a product with 32 vectors at fixed parameters when 1, 2, 4, ... of them share one vectorised
pass backward, divided by the time of the best of these chunks; one batch, medians of interleaved
rounds. *Rule* is the chunk that `hessops.functional.columns` takes, by the memory that the graph
retains and the number of tensors in it: a model of bytes that was made with this table."""

VECTORS = 32
CHUNKS = (1, 2, 4, 8, 16, 32)
KINDS = {"Hessian": HessianBatchOperation, "GGN": GeneralizedGaussNewtonBatchOperation}


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]]:
    """Networks, the shape of a point, and sizes of batches."""
    torch.manual_seed(0)
    return {
        "MLP, 430 parameters": (perceptron(10, 20, CLASSES), (10,), (32, 256)),
        "MLP, 26k": (perceptron(64, 128, 128, CLASSES), (64,), (64, 350, 1400)),
        "MLP, 670k": (perceptron(784, 512, 512, CLASSES), (784,), (64, 512)),
        "convolutional, 26k": (small_convolutional(), (1, 8, 8), (16, 175)),
        "transformer, 26k": (Encoder(8, 8, 32, 2), (8, 8), (16, 175)),
    }


def products(model: nn.Module, data: tuple[Tensor, Tensor], kind: str) -> dict[int, Call]:
    """Chunk -> a product with all vectors, at fixed parameters."""
    calls: dict[int, Call] = {}
    for chunk in CHUNKS:
        operation = KINDS[kind](model.eval(), nn.CrossEntropyLoss(), chunk_size=chunk)
        operator = BatchOperator(operation, [data]).linearize()
        rows = torch.randn(VECTORS, operator.input_size, generator=torch.Generator().manual_seed(1))
        operator.apply(rows[:1])
        calls[chunk] = partial(operator.apply, rows)
    return calls


def rule(model: nn.Module, data: tuple[Tensor, Tensor], kind: str) -> tuple[int, float]:
    """The chunk that the library takes, and the KiB that an operation reads on average."""
    operator = BatchOperator(KINDS[kind](model.eval(), nn.CrossEntropyLoss()), [data])
    operator.check_data()
    operation = operator.batch_operation
    size = operation._graph_size(next(iter(operator.stream)))
    chunk = columns_that_fit(operator.space, size.num_bytes, size.num_tensors)
    return chunk, size.mean_bytes / 2**10


def measure(report: Report) -> None:
    """All networks and batches."""
    rows = []
    for name, (model, shape, sizes) in networks().items():
        for points in sizes[:1] if report.effort.quick else sizes:
            data = (torch.randn(points, *shape), torch.randint(CLASSES, (points,)))
            for kind in KINDS:
                calls = products(model, data, kind)
                times: dict[int, list[float]] = {chunk: [] for chunk in CHUNKS}
                for _ in range(report.effort.rounds):
                    for chunk, call in calls.items():
                        times[chunk].append(seconds(call))
                medians = {chunk: sorted(some)[len(some) // 2] for chunk, some in times.items()}
                best = min(medians.values())
                chosen, kib = rule(model, data, kind)
                ratios = [f"{medians[chunk] / best:.2f}" for chunk in CHUNKS]
                rows.append([f"{name}, {points} points", kind, f"{kib:.0f}", *ratios, str(chosen)])
                print(" | ".join(rows[-1]), flush=True)
    header = ["batch", "matrix", "KiB per tensor", *map(str, CHUNKS), "rule"]
    report.table("Time by the number of vectors in a chunk, of the best", header, rows)


if __name__ == "__main__":
    run("columns", "Vectors in a chunk", DESCRIPTION, measure)
