"""How the work of a product is split over ranks, and what they send.

One rank and two ranks take turns in one run, each rank with one thread: the time of a product of
the Hessian with one vector, over all the data in one rank and over a shard in each of two. All
products are equal to 1e-5. Traffic is counted at the all-reduce and printed beside the formula: k·P
numbers of the sums, and of each rank R its weight in two parts, an error flag and hashes of what
must be equal, 3 + 3·5 numbers; one all-reduce for each application. The last column is what the
product without an all-reduce would take, times the share of the points: what is left is the price
of being several.

    python benchmarks/distributed.py [--points 4096] [--width 512] [--rounds 9] [--vectors 1]
        [--json results.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hessops import DistributedAveraging, HessianOperator
from hessops.distributed import shard

RANKS = 2
NUMBERS_OF_A_RANK = 3 + 3 * 5


def problem(points: int, width: int) -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    )
    return model, TensorDataset(torch.randn(points, 784), torch.randint(10, (points,)))


class Traffic:
    """Counts what is summed over ranks."""

    def __init__(self) -> None:
        self.calls, self.numbers, self.bytes = 0, 0, 0
        self._original = dist.all_reduce

    def __enter__(self) -> Traffic:
        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.numbers += tensor.numel()
            self.bytes += tensor.numel() * tensor.element_size()
            return self._original(tensor, *args, **kwargs)

        dist.all_reduce = all_reduce
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._original


def seconds(operator: HessianOperator, rows: Tensor) -> tuple[float, Tensor]:
    started = time.perf_counter()
    product = operator.apply(rows)
    return time.perf_counter() - started, product


def run_rank(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    model, data = problem(options.points, options.width)
    loss = nn.CrossEntropyLoss()
    loader = DataLoader(shard(data), batch_size=options.batch_size)
    split = HessianOperator(model, loss, loader, averaging=DistributedAveraging())
    whole = HessianOperator(model, loss, DataLoader(data, batch_size=options.batch_size))
    rows = torch.randn(options.vectors, whole.input_size)
    for operator in (split, whole):  # checks, and what is kept on the device
        operator.apply(rows)
        operator.apply(rows)

    alone, shared, halves = [], [], []
    for _ in range(options.rounds):
        dist.barrier()
        if rank == 0:  # the other rank waits, and its core is idle
            took, expected = seconds(whole, rows)
            alone.append(took)
        dist.barrier()
        took, product = seconds(split, rows)
        shared.append(took)
        dist.barrier()
        started = time.perf_counter()
        for batch in split.stream:
            split.batch_operation.apply_rows(batch, rows)
        halves.append(time.perf_counter() - started)
    with Traffic() as traffic:
        split.apply(rows)
    if rank == 0:
        error = (product - expected).norm() / expected.norm()
        assert error < 1e-5, f"the products differ by {error:.1e}"
        found = {
            "alone": alone,
            "shared": shared,
            "halves": halves,
            "calls": traffic.calls,
            "numbers": traffic.numbers,
            "bytes": traffic.bytes,
            "parameters": whole.input_size,
        }
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def report(found: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    pairs = list(zip(found["alone"], found["shared"], found["halves"], strict=True))
    ratio = statistics.median(two / one for one, two, _ in pairs)
    without = statistics.median(half / one for one, _, half in pairs)
    size, vectors = found["parameters"], options.vectors
    formula = vectors * size + RANKS * NUMBERS_OF_A_RANK
    print(f"Hessian product, {size} parameters, {options.points} points, {vectors} vectors")
    print(f"  one rank              {statistics.median(found['alone']) * 1e3:9.1f} ms")
    print(f"  two ranks             {statistics.median(found['shared']) * 1e3:9.1f} ms")
    print(f"  two ranks / one rank  {ratio:9.3f}   (median of {len(pairs)} rounds)")
    print(f"  without the sum       {without:9.3f}")
    print(f"traffic of an application: {found['calls']} all-reduce")
    print(f"  numbers counted       {found['numbers']:9d}   {found['bytes']} bytes")
    print(f"  k·P + R·(3 + 3·5)     {formula:9d}   = {vectors}·{size} + {RANKS}·18")
    assert found["calls"] == 1
    assert found["numbers"] == formula
    return {"two ranks / one rank": ratio, "without the sum": without}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--vectors", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    # Threads of ranks that wait would take a core from those that work.
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, args=(folder, options), nprocs=RANKS)
        found = json.loads(Path(folder, "found.json").read_text())
    results = report(found, options)
    if options.json:
        options.json.write_text(json.dumps({**found, **results}, indent=1))


if __name__ == "__main__":
    main()
