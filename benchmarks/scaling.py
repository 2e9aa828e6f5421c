"""The constants behind docs/scaling.md: what products, factors, scores and sums cost here.

The unit of time is a gradient: one pass of plain autograd over the same batches, which are in
memory already. It is measured alternately with what is divided by it; the table has the medians of
the ratios. Three networks, cross-entropy, float32, one thread:

* digits, 64-128-128-10 with tanh: 26,122 parameters, 1400 points of the digits of scikit-learn in
  batches of 350;
* wide, 784-512-512-10 with tanh: 669,706 parameters, 2048 random points in batches of 512;
* encoder, two blocks of a transformer of width 128 with 4 heads: 397,834 parameters, 64 random
  sequences of length 32 in batches of 32; products only.

Products are of operators that have seen their data, which they keep: what the first pass checks is
a line of its own. Those with 8 and 32 vectors are divided by their number. Passes of KFAC and EKFAC
are whole passes with everything that is verified, without the eigendecompositions. What makes
gradients of single points runs on the first batch.

Memory is the growth of the peak resident memory of a forked process, over what is held before, in
units of what it is thought to be proportional to (Linux only; left out elsewhere). The sum over two
processes goes through gloo on this machine, so that its two constants are those of a loopback
device and not of a network.

    python benchmarks/scaling.py [--rounds 3] [--json PATH]

It takes four to six minutes, as busy as the machine is.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import math
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.multiprocessing import spawn
from tqdm.auto import tqdm

from hessops import (
    Batch,
    CgOperator,
    DiagonalOperator,
    DirectSolveOperator,
    EkfacOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    InverseHarmonicMeanOperator,
    LissaOperator,
    MatrixOperator,
    MinresOperator,
    Objective,
    TensorOperator,
)
from hessops.functional import operator_nystroem_approximation
from hessops.functional.memory import RetainedBytes
from hessops.hashing import hash_of_entries
from hessops.influence import GradientProvider
from hessops.operators.curvature import CurvatureOperator

LOSS = nn.CrossEntropyLoss()
VECTORS = (1, 8, 32)
MATRICES: dict[str, type[CurvatureOperator]] = {
    "Hessian": HessianOperator,
    "empirical Gauss-Newton": GaussNewtonOperator,
    "GGN": GeneralizedGaussNewtonOperator,
}
SKETCH_RANK = 32
SCORED, FACTORS = 256, 64  # training points and test points of the scores
# A measurement ends after so many seconds once it has this many rounds, and a unit is repeated
# until it takes so long.
LEAST_ROUNDS, SECONDS, LEAST_SECONDS = 2, 2.0, 0.02
# Numbers in a sum over processes, and how often it is repeated.
SUM_SIZES, SUM_REPEATS = (1, 2**12, 2**16, 2**20, 2**22), 15
# Of the vectors by which the memory of solvers is measured: large beside everything else.
SOLVED, PARAMETERS = 4, 1_000_000
# Every allocation beyond it goes back to the system when it is freed.
MMAP_THRESHOLD_OPTION, MMAP_THRESHOLD = -3, 65536


@dataclass
class Table:
    """What was found, printed as it comes.

    Attributes:
        values: Name of a constant -> its value.
    """

    values: dict[str, float] = field(default_factory=dict)

    def title(self, text: str) -> None:
        """Begins a part of the table."""
        print(f"\n{text}")

    def add(self, name: str, value: float, unit: str) -> None:
        """Prints and keeps a constant."""
        self.values[name] = value
        print(f"  {name:58}{value:12.4g} {unit}", flush=True)


# --- the networks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A model and its data."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    batch_size: int

    @property
    def positions(self) -> int:
        """Of a point."""
        return self.x[0].numel() // self.x.shape[-1]

    @cached_property
    def first(self) -> Problem:
        """The first batch alone."""
        x, y = self.batches[0]
        return replace(self, x=x, y=y)

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Slices, made once."""
        pairs = zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)
        return list(pairs)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the model."""
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        """P."""
        return sum(p.numel() for p in self.parameters)

    def gradient(self) -> list[Tensor]:
        """The unit: one gradient of the mean loss, by plain autograd."""
        total = [torch.zeros_like(p) for p in self.parameters]
        for x, y in self.batches:
            gradients = torch.autograd.grad(LOSS(self.model(x), y), self.parameters)
            for entry, gradient in zip(total, gradients, strict=True):
                entry.add_(gradient, alpha=len(x) / len(self.x))
        return total


def perceptron(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).eval()


class Encoder(nn.Module):
    """Blocks of a transformer, and a linear layer on the mean over positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(n, positions, width)`` to ``(n, 10)``."""
        return self.head(self.blocks(x).mean(dim=1))


def encoder(width: int) -> nn.Module:
    torch.manual_seed(0)
    return Encoder(width).eval()


def random_problem(name: str, model: nn.Module, *shape: int, batch_size: int) -> Problem:
    """Random points of a shape ``(n, ...)`` and random labels."""
    return Problem(name, model, torch.randn(shape), torch.randint(10, shape[:1]), batch_size)


def problems() -> list[Problem]:
    digits = load_digits()
    x = torch.tensor(digits.data[:1400], dtype=torch.float32) / 16
    y = torch.tensor(digits.target[:1400])
    return [
        Problem("digits", perceptron(64, 128, 128, 10), x, y, 350),
        random_problem("wide", perceptron(784, 512, 512, 10), 2048, 784, batch_size=512),
        random_problem("encoder", encoder(128), 64, 32, 128, batch_size=32),
    ]


# --- time ------------------------------------------------------------------------------------


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def rounds(most: int) -> Iterator[None]:
    """Up to so many rounds, fewer where they take long."""
    start = time.perf_counter()
    for done in range(most):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS:
            return
        yield


def ratio(
    thing: Callable[[], object], unit: Callable[[], object], most: int, *, warm: bool = False
) -> float:
    """The median of the ratios of their times, after one run of each that does not count."""
    if not warm:
        thing()
        unit()
    repeats = max(1, math.ceil(LEAST_SECONDS / seconds(unit)))
    return statistics.median(seconds(thing) / seconds(unit, repeats) for _ in rounds(most))


def time_products(problem: Problem, most: int, table: Table) -> None:
    for name, kind in MATRICES.items():
        first = statistics.median(
            seconds(kind(problem.model, LOSS, problem.batches).check_data)
            / seconds(problem.gradient)
            for _ in rounds(most)
        )
        operator = kind(problem.model, LOSS, problem.batches)
        for count in VECTORS if problem.positions == 1 else VECTORS[:2]:
            rows = torch.randn(count, problem.size)
            product = partial(operator.apply, rows)
            found = ratio(product, problem.gradient, most, warm=count == VECTORS[-1])
            label = f"{problem.name}: {name}, {count} vector{'s' if count > 1 else ''}"
            table.add(label, found / count, "gradients per vector")
        table.add(f"{problem.name}: {name}, check of the data", first, "gradients, once")


def time_harmonic_mean(problem: Problem, most: int, table: Table) -> None:
    few = problem.first
    mean = InverseHarmonicMeanOperator(few.model, LOSS, few.batches, 1.0)
    mean.check_data()
    for count in VECTORS[:2]:
        rows = torch.randn(count, few.size)
        found = ratio(partial(mean.apply, rows), few.gradient, most, warm=True)
        label = f"{problem.name}: inverse harmonic mean, {count} vector{'s' if count > 1 else ''}"
        table.add(label, found, "gradients for all")


def time_sketch(problem: Problem, most: int, table: Table) -> None:
    operator = GeneralizedGaussNewtonOperator(problem.model, LOSS, problem.batches)
    sketch = partial(operator_nystroem_approximation, operator, SKETCH_RANK)
    found = ratio(sketch, problem.gradient, most) / SKETCH_RANK
    table.add(
        f"{problem.name}: Nyström sketch of the GGN, r = {SKETCH_RANK}",
        found,
        "gradients per column",
    )


class TimedEkfac(EkfacOperator):
    """Tells the times of its stages, by private methods."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.seconds: dict[str, float] = {}
        super().__init__(*args, **kwargs)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    def _factors(self, *args: object) -> object:
        with self._timed("factor pass"):
            return super()._factors(*args)

    def _decomposed(self, *args: object) -> object:
        with self._timed("decompositions"):
            return super()._decomposed(*args)

    def _corrected(self, *args: object) -> object:
        with self._timed("correction pass"):
            return super()._corrected(*args)


def time_kronecker(problem: Problem, most: int, table: Table) -> None:
    for fisher_type in ("empirical", "type-2"):
        make = partial(TimedEkfac, problem.model, LOSS, problem.batches, fisher_type)
        make()
        stages: dict[str, list[float]] = {}
        for _ in rounds(most):
            unit = seconds(problem.gradient)
            for stage, spent in make().seconds.items():
                stages.setdefault(stage, []).append(spent / unit)
        for stage, ratios in stages.items():
            label = f"{problem.name}: EKFAC, {fisher_type}, {stage}"
            table.add(label, statistics.median(ratios), "gradients")


def time_scores(problem: Problem, most: int, table: Table) -> None:
    """Scores of factors and points, beside a product of matrices of as many multiplications."""
    provider = GradientProvider(Objective(problem.model, LOSS))
    few = replace(problem, x=problem.x[:SCORED], y=problem.y[:SCORED])
    factors = torch.randn(FACTORS, problem.size)
    batch = provider.batch(few.x, few.y)
    score = partial(provider.products, batch, factors)
    points = torch.randn(SCORED, problem.size)
    found = ratio(score, lambda: factors @ points.T, most)
    pairs = FACTORS * SCORED * problem.size
    table.add(
        f"{problem.name}: scores, {FACTORS} factors x {SCORED} points",
        seconds(score) / pairs,
        "s per factor, point and parameter",
    )
    table.add(f"{problem.name}: scores / bare product of matrices (m, P) (P, n)", found, "times")
    found = ratio(partial(provider.rows, batch), few.gradient, most)
    table.add(f"{problem.name}: gradients of points, (n, P)", found, "gradients")


def time_machine(most: int, table: Table) -> None:
    square = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / statistics.median(seconds(lambda: square @ square) for _ in range(9))
    table.add("product of matrices, float32, 1024", rate / 1e9, "GFLOP/s")
    long, other = torch.randn(2**25), torch.zeros(2**25)
    copy = statistics.median(seconds(partial(other.copy_, long)) for _ in range(9))
    table.add("copy of 128 MiB", long.nbytes / copy / 1e9, "GB/s")
    for dtype in (torch.float32, torch.float64):
        for size in (512, 1024):
            rows = torch.randn(2 * size, size, dtype=dtype)
            matrix = rows.T @ rows / len(rows)
            torch.linalg.eigh(matrix)
            spent = statistics.median(
                seconds(partial(torch.linalg.eigh, matrix)) for _ in rounds(most)
            )
            name = f"eigendecomposition, {str(dtype).removeprefix('torch.')}, n = {size}"
            table.add(name, spent / size**3, "s / n^3")
            # The count of LAPACK's own tables for a symmetric matrix with all eigenvectors.
            table.add(f"{name}, at 9 n^3", 9 * size**3 / spent / 1e9, "GFLOP/s")
    vector = torch.randn(2**22)
    hashed = statistics.median(seconds(lambda: hash_of_entries(vector)) for _ in range(5))
    table.add("hash of right-hand sides", hashed / vector.nbytes, "s / byte")
    table.add("hash of right-hand sides / copy", hashed / vector.nbytes * long.nbytes / copy, "")
    time_steps(most, table)


SOLVERS: dict[str, Callable[..., TensorOperator]] = {
    "CG": CgOperator,
    "block CG": partial(CgOperator, use_block_cg=True),
    "MINRES": MinresOperator,
    "LiSSA": partial(LissaOperator.from_operator, scale=2.0),
}


def diagonal_system(size: int) -> DiagonalOperator:
    """Its products are as cheap as can be: what is left is the solver's own."""
    return DiagonalOperator(torch.linspace(0.1, 1.0, size))


def time_steps(most: int, table: Table) -> None:
    rhs = torch.randn(SOLVED, PARAMETERS)
    other = torch.zeros_like(rhs)
    operator = diagonal_system(rhs.shape[1])
    few, many = 3, 8
    for name, solver in SOLVERS.items():
        solves = [solver(operator, maxiter=steps, rtol=0.0) for steps in (few, many)]
        solves[0].solve(rhs)
        found = statistics.median(
            (seconds(partial(solves[1].solve, rhs)) - seconds(partial(solves[0].solve, rhs)))
            / (many - few)
            / seconds(partial(other.copy_, rhs))
            for _ in rounds(most)
        )
        table.add(f"{name}, own work of a step for {SOLVED} right-hand sides", found, "copies")


# --- memory ----------------------------------------------------------------------------------


def peak_bytes() -> int:
    """Of this process, since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def grown(stage: Callable[[], object]) -> float:
    """Bytes by which the peak of a forked process grows in a stage."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        code = 1
        try:
            Path("/proc/self/clear_refs").write_text("5")
            before = peak_bytes()
            stage()
            os.write(writing, str(peak_bytes() - before).encode())
            code = 0
        finally:
            os._exit(code)
    os.wait()
    os.close(writing)
    with os.fdopen(reading) as answer:
        return float(answer.read())


def measure_memory(table: Table) -> None:
    """In a process of its own, so that nothing that was freed before is used again."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(memory_in_process, args=(folder,), nprocs=1)
        table.values |= json.loads((Path(folder) / "values").read_text())


def memory_in_process(_: int, folder: str) -> None:
    silence()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD_OPTION, MMAP_THRESHOLD)
    table = Table()
    memory_of_solvers(table)
    memory_of_vectors(table)
    memory_of_points(table)
    memory_of_matrix(table)
    memory_of_gradients(table)
    (Path(folder) / "values").write_text(json.dumps(table.values))


def silence() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    # Its own lock is one between processes, of which those that are forked leave something behind.
    tqdm.set_lock(threading.RLock())


def memory_of_solvers(table: Table) -> None:
    sizes = (PARAMETERS, 2 * PARAMETERS)
    for name, solver in SOLVERS.items():
        peaks = []
        for size in sizes:
            solve = solver(diagonal_system(size), 0.01, maxiter=4, rtol=0.0).solve
            peaks.append(grown(partial(solve, torch.randn(SOLVED, size))))
        stacks = (peaks[1] - peaks[0]) / (4 * SOLVED * (sizes[1] - sizes[0]))
        table.add(f"{name}, beside the right-hand sides (k, P)", stacks, "stacks (k, P)")
    sketch = partial(operator_nystroem_approximation, rank=SKETCH_RANK)
    peaks = [grown(partial(sketch, diagonal_system(size // 4))) for size in sizes]
    stacks = (peaks[1] - peaks[0]) / (SKETCH_RANK * (sizes[1] - sizes[0]))
    table.add(f"Nyström sketch, r = {SKETCH_RANK}", stacks, "stacks (r, P)")


def memory_of_vectors(table: Table) -> None:
    """Products on two points: what remains is proportional to P."""
    model = perceptron(1500, 1500, 1500, 10)
    size = sum(p.numel() for p in model.parameters())
    batches = [(torch.randn(2, 1500), torch.tensor([0, 1]))]
    for name, kind in MATRICES.items():
        operator = kind(model, LOSS, batches)
        operator.check_data()
        for count in (1, 8):
            rows = torch.randn(count, size)
            peak = grown(partial(operator.apply, rows)) / (4 * size)
            label = f"{name} product, {count} vector{'s' if count > 1 else ''}, few points"
            table.add(label, peak, "vectors of P numbers")


def memory_of_points(table: Table) -> None:
    """What a point adds: slopes between two sizes of a batch, beside what a forward retains."""
    narrow, positions = 64, 32
    small, large = perceptron(784, 512, 512, 10), encoder(narrow)
    wide = [random_problem("wide", small, n, 784, batch_size=n) for n in (1024, 4096)]
    shape = (positions, narrow)
    encoded = [random_problem("encoder", large, n, *shape, batch_size=n) for n in (32, 128)]
    for pair in (wide, encoded):
        unit = slope(pair, [retained(problem) for problem in pair])
        if pair is encoded:
            numbers = unit / 4 / positions / 2 / narrow
            table.add("encoder: retained by a forward", numbers, "numbers per block, width")
        else:
            numbers = unit / 4 / (512 + 512 + 10)
            table.add("wide: retained by a forward", numbers, "numbers per output of a layer")
        for name, kind in MATRICES.items():
            for count in (1, 8):
                peaks = [peak_of_product(kind, problem, count) for problem in pair]
                label = f"{pair[0].name}: {name}, {count} vector{'s' if count > 1 else ''}, a point"
                table.add(label, slope(pair, peaks) / unit, "times what a forward retains")


def slope(pair: list[Problem], values: list[float]) -> float:
    """Per point."""
    return (values[1] - values[0]) / (len(pair[1].x) - len(pair[0].x))


def retained(problem: Problem) -> int:
    bytes_of_graph = RetainedBytes()
    objective = Objective(problem.model, LOSS)
    batch = Batch.from_raw((problem.x, problem.y))
    leaves = {name: p.requires_grad_() for name, p in objective.params.items()}
    with objective.differentiating("the loss"), bytes_of_graph.counting():
        objective.batch_loss(leaves, batch)
    return bytes_of_graph.total - (problem.x.nbytes if problem.positions == 1 else 0)


def peak_of_product(kind: type[CurvatureOperator], problem: Problem, count: int) -> float:
    operator = kind(problem.model, LOSS, problem.batches)
    operator.check_data()
    for _ in operator.stream:  # kept batches are compared with the data before their second use
        pass
    return grown(partial(operator.apply, torch.randn(count, operator.input_size)))


def memory_of_matrix(table: Table) -> None:
    """Of a direct solve, in the size of the matrix."""
    rows = torch.randn(6000, 3000)
    matrix = MatrixOperator(rows.T @ rows / len(rows), symmetric=True)
    solve = partial(DirectSolveOperator, matrix.matrix, 1.0)
    peak = grown(solve) / matrix.matrix.nbytes
    table.add("DirectSolveOperator, beside the matrix", peak, "matrices (P, P)")


def memory_of_gradients(table: Table) -> None:
    problem = random_problem("wide", perceptron(784, 512, 512, 10), 128, 784, batch_size=128)
    provider = GradientProvider(Objective(problem.model, LOSS))
    batch = provider.batch(problem.x, problem.y)
    peak = grown(partial(provider.rows, batch)) / (4 * problem.size * len(problem.x))
    table.add("gradients of 128 points", peak, "matrices (n, P)")
    factors = torch.randn(FACTORS, problem.size)
    peak = grown(partial(provider.products, batch, factors)) / factors.nbytes
    table.add(f"scores of {FACTORS} factors, beside them", peak, "matrices (m, P)")


# --- sums over processes ---------------------------------------------------------------------


def sum_in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "meeting").as_uri(),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    found = []
    for size in SUM_SIZES:
        numbers = torch.zeros(size)
        times = []
        for _ in range(SUM_REPEATS):
            dist.barrier()
            times.append(seconds(partial(dist.all_reduce, numbers)))
        found.append(statistics.median(times))
    if rank == 0:
        (Path(folder) / "times").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure_sums(table: Table) -> None:
    """Latency and seconds per byte of a sum, from the smallest and the largest."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(sum_in_process, args=(folder,), nprocs=2)
        times = json.loads((Path(folder) / "times").read_text())
    for size, spent in zip(SUM_SIZES, times, strict=True):
        table.add(f"all-reduce of {size} numbers", spent, "s")
    per_byte = (times[-1] - times[0]) / (4 * (SUM_SIZES[-1] - SUM_SIZES[0]))
    table.add("all-reduce, latency", times[0], "s")
    table.add("all-reduce, per byte", per_byte, "s / byte")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the constants are written, too")
    arguments = parser.parse_args()
    silence()
    table, start = Table(), time.perf_counter()
    if Path("/proc/self/clear_refs").exists():
        table.title("memory")
        measure_memory(table)
    table.title("a sum over two processes, gloo, this machine")
    measure_sums(table)
    table.title("this machine, one thread")
    time_machine(arguments.rounds, table)
    for problem in problems():
        unit = statistics.median(seconds(problem.gradient) for _ in range(9))
        table.title(
            f"{problem.name}: {problem.size:,} parameters, {len(problem.x)} points in batches of "
            f"{problem.batch_size}; a gradient takes {unit * 1e3:.1f} ms"
        )
        table.values[f"{problem.name}: seconds of a gradient"] = unit
        rate = 6 * problem.size * len(problem.x) * problem.positions / unit / 1e9
        table.add(f"{problem.name}: gradient, at 6 n T P", rate, "GFLOP/s")
        time_products(problem, arguments.rounds, table)
        if problem.positions == 1:
            for measure in (time_harmonic_mean, time_sketch, time_kronecker, time_scores):
                measure(problem, arguments.rounds, table)
    print(f"\n{time.perf_counter() - start:.0f} seconds")
    if arguments.json:
        content = {"torch": torch.__version__, "threads": 1, "constants": table.values}
        arguments.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
