"""Time and memory of EKFAC influences, stage by stage, beside kronfluence.

A 784-650-650-10 ReLU network (about a million parameters, biases included) has N random points with
random labels and the cross-entropy. Both libraries accumulate the Kronecker factors, decompose
them, correct the eigenvalues in a second pass and score 100 queries against all N points; float32,
one thread, the same batches. Runs alternate. The ratios are kronfluence / hessops of the medians:

* empirical Fisher on both sides: equal work without randomness. The products with the matrix, its
  leading eigenvalues and the scores of both are compared at one damping, and again for a small
  network in float64; the exit status is 1 if they differ by more than rounding;
* one label a point drawn from the model on both sides, which is what kronfluence does by default;
* the exact type-2 Fisher, the default of `hessops`, beside that same default of kronfluence.

    python benchmarks/kronecker_stages.py [--quick] [--points 1000] [--width 650] [--batch 250]
        [--queries 100] [--damping 1e-4] [--repeats 3]

Everything takes about a quarter of an hour, nearly all of it kronfluence's.

The first pass of `hessops` also verifies, on every batch, that the loss is the mean of those of the
points, that points do not interact, and that every layer is what it is taken for. kronfluence has
nothing like it, so it is a stage of its own; the totals include it.

kronfluence is called as kindly as could be: its stage functions directly, in memory (its Analyzer
writes every stage to files and reads them back; that is measured once more by itself, in /dev/shm),
without workers, progress bars, offloading or partitions, on batches that are sliced beforehand, all
queries in one batch. It decomposes in float64 whatever the model has, which is its default, and so
does `hessops` here, but for the line that has its own defaults. `use_iterative_lambda_aggregation`
of kronfluence, off by default, is measured once too.

Memory is the growth of the peak resident memory over what a process holds that has imported both
libraries, made model and data and run the model once; a process for each line.

kronfluence 1.0.1 demands torchvision, but never imports it. What it needs beside torch is

    pip install --no-deps kronfluence accelerate safetensors opt_einsum
    pip install einops einconv tqdm numpy packaging pyyaml
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition
from kronfluence.score.pairwise import compute_pairwise_scores_with_loaders
from kronfluence.task import Task
from kronfluence.utils.state import State
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from hessops import EkfacOperator
from hessops.batch.kronecker import KroneckerEstimation
from hessops.influence import EkfacInfluence

INPUTS, CLASSES = 784, 10
LOSS = nn.CrossEntropyLoss()
STAGES = ("verification", "factors", "eigendecomposition", "correction", "scores")
# Eigenvalues of a layer that are compared, and random vectors that are multiplied.
LEADING, VECTORS = 8, 4
# The largest relative differences between the sides that rounding explains: in float32 it turns
# eigenvectors of close eigenvalues, on which K depends.
TOLERANCES = {
    torch.float32: {"product": 1e-4, "eigenvalues": 1e-4, "scores": 1e-3},
    torch.float64: {"product": 1e-8, "eigenvalues": 1e-8, "scores": 1e-8},
}
# Every allocation beyond it goes back to the system when it is freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}

Batch = tuple[Tensor, Tensor]


class Batches:
    """Slices made beforehand; `dataset` is where kronfluence looks for the number of points."""

    def __init__(self, x: Tensor, y: Tensor, size: int) -> None:
        self.dataset = TensorDataset(x, y)
        self.batches = list(zip(x.split(size), y.split(size), strict=True))

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass(frozen=True)
class Problem:
    """A model and its data."""

    model: nn.Module
    train: Batches
    test: Batches
    damping: float

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return next(self.model.parameters()).dtype


def problem(arguments: argparse.Namespace, dtype: torch.dtype = torch.float32) -> Problem:
    torch.manual_seed(0)
    width = arguments.width
    model = nn.Sequential(
        nn.Linear(INPUTS, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )
    model = model.to(dtype).eval()

    def points(count: int) -> Batch:
        return torch.randn(count, INPUTS, dtype=dtype), torch.randint(CLASSES, (count,))

    train = Batches(*points(arguments.points), arguments.batch)
    test = Batches(*points(arguments.queries), arguments.queries)
    return Problem(model, train, test, arguments.damping)


@dataclass
class Clock:
    """The seconds of stages, one after the other.

    Attributes:
        seconds: Stage -> its time.
        peaks: Stage -> peak resident bytes of the process at its end.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage."""
        now = time.perf_counter()
        self.seconds[stage] = now - self.since
        self.peaks[stage] = peak_bytes()
        self.since = time.perf_counter()


@dataclass(frozen=True)
class Run:
    """What a side has found.

    Attributes:
        clock: Its times.
        scores: ``(queries, points)``.
        factors: kronfluence's, by name and layer; empty for `hessops`.
    """

    clock: Clock
    scores: Tensor
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)


# --- kronfluence -----------------------------------------------------------------------------


class Classification(Task):
    """The sums of losses, so that gradients are those of single points."""

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        """Of the labels, or of some that are drawn from the model."""
        x, y = batch
        output = model(x)
        if sample:
            y = torch.multinomial(output.detach().softmax(dim=1), 1).flatten()
        return cross_entropy(output, y, reduction="sum")

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        """The loss here too."""
        return self.compute_train_loss(batch, model)


def settings(
    data: Problem, empirical: bool, iterative: bool
) -> tuple[FactorArguments, ScoreArguments]:
    """Its defaults, but for the precision of a model in double."""
    dtype = data.dtype
    factor_args = FactorArguments(
        use_empirical_fisher=empirical,
        use_iterative_lambda_aggregation=iterative,
        activation_covariance_dtype=dtype,
        gradient_covariance_dtype=dtype,
        per_sample_gradient_dtype=dtype,
        lambda_dtype=dtype,
    )
    score_args = ScoreArguments(
        damping_factor=data.damping,
        per_sample_gradient_dtype=dtype,
        precondition_dtype=dtype,
        score_dtype=dtype,
    )
    return factor_args, score_args


def kronfluence(data: Problem, *, empirical: bool, iterative: bool = False) -> Run:
    """Its stage functions in memory."""
    torch.manual_seed(0)
    task = Classification()
    factor_args, score_args = settings(data, empirical, iterative)
    common = {
        "model": prepare_model(copy.deepcopy(data.model), task),
        "state": State(cpu=True),
        "factor_args": factor_args,
        "disable_tqdm": True,
    }
    clock = Clock()
    _, covariances = fit_covariance_matrices_with_loader(task=task, loader=data.train, **common)
    clock.lap("factors")
    factors = perform_eigendecomposition(covariances, **common)
    del covariances
    clock.lap("eigendecomposition")
    _, corrections = fit_lambda_matrices_with_loader(
        task=task, loader=data.train, eigen_factors=factors, **common
    )
    clock.lap("correction")
    factors |= corrections
    scores = compute_pairwise_scores_with_loaders(
        loaded_factors=factors,
        task=task,
        query_loader=data.test,
        per_device_query_batch_size=len(data.test.dataset),
        train_loader=data.train,
        score_args=score_args,
        tracked_module_names=None,
        **common,
    )
    clock.lap("scores")
    return Run(clock, scores["all_modules"], factors)


def kronfluence_with_files(data: Problem) -> Clock:
    """Its Analyzer, which writes to files in memory where there is a place for them."""
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None
    task, size = Classification(), len(data.train.batches[0][0])
    factor_args, score_args = settings(data, empirical=True, iterative=False)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        analyzer = Analyzer(
            "kronecker",
            prepare_model(copy.deepcopy(data.model), task),
            task,
            cpu=True,
            disable_tqdm=True,
            output_dir=folder,
        )
        points = {"dataset": data.train.dataset, "per_device_batch_size": size}
        clock = Clock()
        analyzer.fit_covariance_matrices("all", factor_args=factor_args, **points)
        clock.lap("factors")
        analyzer.perform_eigendecomposition("all", factor_args=factor_args)
        clock.lap("eigendecomposition")
        analyzer.fit_lambda_matrices("all", factor_args=factor_args, **points)
        clock.lap("correction")
        analyzer.compute_pairwise_scores(
            "all",
            "all",
            query_dataset=data.test.dataset,
            train_dataset=data.train.dataset,
            per_device_query_batch_size=len(data.test.dataset),
            per_device_train_batch_size=size,
            score_args=score_args,
        )
        clock.lap("scores")
    return clock


# --- hessops ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Which matrix.

    Attributes:
        fisher_type: As `hessops` calls it.
        eigh_dtype: In which factors are decomposed; float64 is what kronfluence does.
    """

    fisher_type: str
    eigh_dtype: torch.dtype | None = torch.float64

    @property
    def arguments(self) -> dict[str, object]:
        """For an operator or an influence model."""
        return {"fisher_type": self.fisher_type, "eigh_dtype": self.eigh_dtype}


EMPIRICAL, MONTE_CARLO = Kind("empirical"), Kind("monte-carlo")
DEFAULT = Kind("type-2", eigh_dtype=None)


def influence(data: Problem, kind: Kind) -> EkfacInfluence:
    return EkfacInfluence(
        data.model,
        update_diagonal=True,
        hessian_regularization=data.damping,
        loss=LOSS,
        **kind.arguments,
    )


def scores(fitted: EkfacInfluence, data: Problem) -> Tensor:
    (x_test, y_test), (x, y) = data.test.dataset.tensors, data.train.dataset.tensors
    return fitted.influences(x_test, y_test, x, y)


def hessops(data: Problem, kind: Kind) -> Run:
    """The stages of a fit, and the scores."""
    torch.manual_seed(0)
    clock = hessops_stages(data, kind)
    fitted = influence(data, kind).fit(data.train.batches)
    clock.since = time.perf_counter()
    found = scores(fitted, data)
    clock.lap("scores")
    return Run(clock, found)


class TimedEkfac(EkfacOperator):
    """Tells the times of its stages, by private methods; the factors include the construction."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.clock = Clock(seconds={"verification": 0.0})
        super().__init__(*args, **kwargs)

    @contextmanager
    def _verifying(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.clock.seconds["verification"] += time.perf_counter() - start

    def _checked_batches(self) -> Iterator[object]:
        batches = super()._checked_batches()
        while True:
            with self._verifying():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _factors(self, estimation: KroneckerEstimation) -> object:
        verify = estimation.verify

        def timed(*args: object) -> object:
            with self._verifying():
                return verify(*args)

        estimation.verify = timed
        result = super()._factors(estimation)
        self.clock.lap("factors")
        self.clock.seconds["factors"] -= self.clock.seconds["verification"]
        return result

    def _decomposed(self, *args: object) -> object:
        result = super()._decomposed(*args)
        self.clock.lap("eigendecomposition")
        return result

    def _corrected(self, *args: object) -> object:
        result = super()._corrected(*args)
        self.clock.lap("correction")
        return result


def hessops_stages(data: Problem, kind: Kind) -> Clock:
    """The times of a fit by stages, without the scores."""
    return TimedEkfac(data.model, LOSS, data.train.batches, **kind.arguments).clock


# --- the comparison of numbers ---------------------------------------------------------------


def joined(weight: Tensor, bias: Tensor) -> Tensor:
    """Weights with the bias as the last column, as kronfluence has it."""
    return torch.cat([weight, bias.unsqueeze(-1)], dim=-1)


def layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]


def split(model: nn.Module, vectors: Tensor) -> dict[str, Tensor]:
    """From ``(k, P)`` to layer -> ``(k, out, in + 1)``."""
    parts = iter(vectors.split([p.numel() for p in model.parameters()], dim=1))
    return {
        name: joined(next(parts).reshape(-1, *layer.weight.shape), next(parts))
        for name, layer in layers(model)
    }


def flat(blocks: dict[str, Tensor]) -> Tensor:
    """The inverse of `split`."""
    pieces = [part for b in blocks.values() for part in (b[..., :-1].flatten(1), b[..., -1])]
    return torch.cat(pieces, dim=1)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def compared(data: Problem, ours: Run, theirs: Run) -> bool:
    """Prints relative differences of products with K, its leading eigenvalues and the scores.

    kronfluence sums over the points and stores their number; K is the mean.
    """
    operator = EkfacOperator(data.model, LOSS, data.train.batches, **EMPIRICAL.arguments)
    q_in, q_out = (theirs.factors[f"{kind}_eigenvectors"] for kind in ("activation", "gradient"))
    count = theirs.factors["num_lambda_processed"]
    spectra = {name: s / count[name] for name, s in theirs.factors["lambda_matrix"].items()}

    generator = torch.Generator().manual_seed(1)
    size = sum(p.numel() for p in data.model.parameters())
    vectors = torch.randn(VECTORS, size, generator=generator, dtype=data.dtype)
    products = flat(
        {
            name: q_out[name] @ (spectra[name] * (q_out[name].T @ v @ q_in[name])) @ q_in[name].T
            for name, v in split(data.model, vectors).items()
        }
    )
    errors = {"product": relative(operator.apply(vectors), products)}

    # u'Ku for the eigenvectors u of a layer that belong to its largest eigenvalues.
    quadratic = []
    for name, spectrum in spectra.items():
        top = spectrum.flatten().topk(LEADING)
        rows, columns = top.indices // spectrum.shape[1], top.indices % spectrum.shape[1]
        blocks = split(data.model, vectors.new_zeros(LEADING, size))
        blocks[name] = torch.einsum("ok,ik->koi", q_out[name][:, rows], q_in[name][:, columns])
        eigenvectors = flat(blocks)
        quadratic.append((operator.apply(eigenvectors) * eigenvectors).sum(dim=1) / top.values)
    errors["eigenvalues"] = (torch.cat(quadratic) - 1).abs().max().item()
    errors["scores"] = relative(ours.scores, theirs.scores)
    means = ", ".join(f"{s.mean():.1e}" for s in spectra.values())
    print(
        f"{str(data.dtype).removeprefix('torch.')}, {size:,} parameters, damping "
        f"{data.damping:.0e}, mean eigenvalues of the layers {means}; relative differences: "
        + ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
    )
    return all(error <= TOLERANCES[data.dtype][what] for what, error in errors.items())


# --- the tables ------------------------------------------------------------------------------

OURS = {
    "hessops, empirical": EMPIRICAL,
    "hessops, Monte Carlo": MONTE_CARLO,
    "hessops, type-2 (default)": DEFAULT,
}
ITERATIVE, FILES = "kronfluence, empirical, iterative", "kronfluence, empirical, with files"
# In the order in which they alternate.
ROUTES: dict[str, Callable[[Problem], Run]] = {
    "hessops, empirical": partial(hessops, kind=EMPIRICAL),
    "kronfluence, empirical": partial(kronfluence, empirical=True),
    "hessops, Monte Carlo": partial(hessops, kind=MONTE_CARLO),
    "kronfluence, Monte Carlo (default)": partial(kronfluence, empirical=False),
    "hessops, type-2 (default)": partial(hessops, kind=DEFAULT),
    ITERATIVE: partial(kronfluence, empirical=True, iterative=True),
}
# What is divided by what.
RATIOS = {
    "empirical on both sides": ("kronfluence, empirical", "hessops, empirical"),
    "Monte Carlo on both sides": ("kronfluence, Monte Carlo (default)", "hessops, Monte Carlo"),
    "defaults of both": ("kronfluence, Monte Carlo (default)", "hessops, type-2 (default)"),
}


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(route: str, data: Problem) -> dict[str, float]:
    """MiB above the start, after the fit and after the scores."""
    x, y = data.train.batches[0]
    LOSS(data.model(x), y).backward()
    data.model.zero_grad()
    torch.linalg.eigh(torch.eye(8, dtype=torch.float64))
    before = peak_bytes()
    if route in OURS:
        fitted = influence(data, OURS[route]).fit(data.train.batches)
        fit = peak_bytes()
        scores(fitted, data)
        whole = peak_bytes()
    else:
        peaks = ROUTES[route](data).clock.peaks
        fit, whole = peaks["correction"], peaks["scores"]
    return {"fit": (fit - before) / 2**20, "whole": (whole - before) / 2**20}


def measured_memory(route: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--route", route]
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(output.stdout.splitlines()[-1])


def time_table(times: dict[str, list[dict[str, float]]]) -> None:
    stages = (*STAGES, "total")
    print(f"\n{'seconds, min / median':36}" + "".join(f"{stage:>20}" for stage in stages))
    medians = {}
    for name, runs in times.items():
        runs = [{"verification": 0.0, **run, "total": sum(run.values())} for run in runs]
        medians[name] = {s: statistics.median(run[s] for run in runs) for s in stages}
        cells = [
            f"{min(run[s] for run in runs):.3f} / {medians[name][s]:.3f}"
            if medians[name][s]
            else ""
            for s in stages
        ]
        print(f"{name:36}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"\n{'time, kronfluence / hessops':36}" + "".join(f"{stage:>20}" for stage in stages))
    for name, (theirs, ours) in RATIOS.items():
        cells = [
            f"{medians[theirs][s] / medians[ours][s]:.2f}" if medians[theirs][s] else ""
            for s in stages
        ]
        print(f"{name:36}" + "".join(f"{cell:>20}" for cell in cells))


def memory_table(peaks: dict[str, dict[str, float]]) -> None:
    print(f"\n{'peak MiB above the start':36}{'after the fit':>20}{'with the scores':>20}")
    for name, peak in peaks.items():
        print(f"{name:36}{peak['fit']:20,.0f}{peak['whole']:20,.0f}")
    print(f"\n{'memory, kronfluence / hessops':36}{'after the fit':>20}{'with the scores':>20}")
    for name, (theirs, ours) in RATIOS.items():
        ratios = [peaks[theirs][kind] / peaks[ours][kind] for kind in ("fit", "whole")]
        print(f"{name:36}" + "".join(f"{ratio:20.2f}" for ratio in ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--width", type=int, default=650)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--damping", type=float, default=1e-4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small network, twice")
    parser.add_argument("--route", choices=ROUTES, help="prints the memory of one line only")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.points, arguments.width, arguments.repeats = 250, 64, 2
    torch.set_num_threads(1)
    # Deprecated parts of torch that kronfluence uses.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if arguments.route:
        print(json.dumps(memory(arguments.route, problem(arguments))))
        return
    # A process starts with the peak of the one that starts it, so this comes before any work.
    peaks = {name: measured_memory(name) for name in ROUTES}
    # What a first call costs once is not counted: everything runs on a small problem before.
    reduced = argparse.Namespace(**{**vars(arguments), "points": 250, "width": 64})
    small = problem(reduced)
    for route in (*ROUTES.values(), kronfluence_with_files):
        route(small)
    data = problem(arguments)
    size = sum(p.numel() for p in data.model.parameters())
    print(
        f"{size:,} parameters, {arguments.points} points in batches of {arguments.batch}, "
        f"{arguments.queries} queries, {arguments.repeats} runs, one thread, float32"
    )

    times: dict[str, list[dict[str, float]]] = {name: [] for name in ROUTES}
    found: dict[str, Run] = {}
    for repeat in range(arguments.repeats):
        for name, route in ROUTES.items():
            if repeat == 0 or name != ITERATIVE:
                found[name] = route(data)
                times[name].append(found[name].clock.seconds)
    times[FILES] = [kronfluence_with_files(data).seconds]
    time_table(times)
    memory_table(peaks)

    print()
    same = compared(data, found["hessops, empirical"], found["kronfluence, empirical"])
    small = problem(reduced, torch.float64)
    same &= compared(small, hessops(small, EMPIRICAL), kronfluence(small, empirical=True))
    if not same:
        sys.exit("the sides differ by more than rounding explains")


if __name__ == "__main__":
    main()
