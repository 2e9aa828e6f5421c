"""How well influences predict real retraining: the linear datamodeling score on digits.

A 64-16-10 tanh network with weight decay is trained anew on random halves S of the training points,
from several seeds, and the loss of every test point z is measured under the retrained models, as
the mean over the seeds. The influences I of models trained on *all* points predict it: leaving a
point out raises the loss on z by I / N, so that the prediction for S is minus the sum of I(z, i)
over i in S, but for what is the same for every S. The linear datamodeling score (LDS; Ilyas et al.
2022, Park et al. 2023) is Spearman's correlation over the subsets between prediction and
measurement, averaged over the test points.

The training minimises the mean loss plus c/2 times the squared norm of the parameters, so that the
damping that belongs to it is λ = c. Scores are averaged over several models trained on all points,
to a minimum and from seeds that no retrained model has. The ceiling is what the noise of the
retraining permits: r is the LDS of the means over one half of the seeds as a prediction of the
means over the other half, averaged over the ways to halve them; 2r / (1 + r) is the reliability of
the means over all seeds (Spearman-Brown), and its square root the correlation with them that a
prediction of their expectation has. Standard errors are those of a bootstrap over the subsets.

KFAC and EKFAC stand beside the EKFAC of kronfluence at the same absolute damping: with the labels
of the points on both sides (empirical); with one label a point drawn from the model on both sides
(Monte Carlo, kronfluence's default; the mean score of several draws); and with the exact type-2
Fisher matrix, the default of `hessops`, which is the generalized Gauss-Newton matrix of the other
rows. kronfluence is optional: where it is not installed, its rows say so.
`benchmarks/kronecker_stages.py` says how to install it without the torchvision that it demands but
never imports.

    python benchmarks/attribution_quality.py [--quick] [--points 500] [--subsets 100] [--seeds 4]
        [--models 3] [--tests 50] [--decay 0.003] [--steps 800]

At the end, at every damping, the exit status is 1 unless

* conjugate gradients and both low-rank inverses of full rank have the score of the direct solve
  with the same curvature;
* the score of EKFAC with the empirical Fisher matrix is that of kronfluence, and with sampled
  labels not below it but for a tolerance;
* the score of EKFAC with the type-2 Fisher matrix is not below that of kronfluence with sampled
  labels by more than the standard error of that.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from types import SimpleNamespace
from typing import Protocol, Self

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from hessops.errors import ConvergenceWarning, SolverError
from hessops.influence import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
)

LOSS = nn.CrossEntropyLoss()
WIDTH = 16
LEARNING_RATE, MOMENTUM = 1.5, 0.9
# Models that are stacked in one product while they train.
STACKED = 100
# The seed of the points and of the subsets, and that of the bootstrap and the sketches.
MASK_SEED, SKETCH_SEED = 0, 0
# Retrained models have the seeds from 0 on, those that are explained the seeds from here on.
FIRST_EXPLAINED = 1000
# How many times as long those are trained: at a minimum A + cI of the Hessian has no negative
# eigenvalue, and close to one it may still have some.
PATIENCE = 8
# The damping, in multiples of the weight decay.
FACTORS = (0.1, 1.0, 10.0, 100.0)
RESAMPLES = 200
# How often labels are drawn from the models, where a method does that.
DRAWS = 5
# How far the score of an exact inverse may be from that of the direct solve.
TOLERANCE = 0.02
# How far EKFAC with the labels of the points may be from that of kronfluence: both are the same
# matrix in float64, and only ties in the ranks of the predictions are left to rounding.
CLOSE = 1e-3
# A rank beyond the size of any block; what takes a rank takes the size instead.
FULL = 10**6

HESSIAN, GGN, EMPIRICAL = "hessian", "generalized_gauss_newton", "gauss_newton"
BASELINE, REFERENCE = "gradient dot product, no inverse", "direct"
EXACT = ("CG", "Arnoldi, Woodbury, rank P", "Nyström, rank P")

# The end of the name of what draws labels.
MONTE_CARLO = "Monte Carlo"
EKFAC, SAMPLED, LABELS = "EKFAC", f"EKFAC, {MONTE_CARLO}", "EKFAC, empirical"
PEER_SAMPLED, PEER_LABELS = f"kronfluence EKFAC, {MONTE_CARLO}", "kronfluence EKFAC, empirical"

Batch = tuple[Tensor, Tensor]
Parameters = dict[str, Tensor]


class Explanation(Protocol):
    """What is asked of an influence model."""

    def fit(self, batches: list[Batch]) -> Self:
        """Sees the training points."""

    def with_regularization(self, damping: float) -> Self:
        """The same at another damping."""

    def influences(self, x_test: Tensor, y_test: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """``(tests, n)``."""


Recipe = Callable[[nn.Module, nn.Module, float], Explanation]


# --- Kronecker factors -----------------------------------------------------------------------


def kronecker(model: nn.Module, loss: nn.Module, damping: float, **settings: object) -> Explanation:
    return EkfacInfluence(model, regularization=damping, loss=loss, **settings)


def peer_modules() -> SimpleNamespace:
    """What is needed of kronfluence, by the last part of its name."""
    names = (
        "analyzer",
        "arguments",
        "factor.covariance",
        "factor.eigen",
        "score.pairwise",
        "task",
        "utils.state",
    )
    found = {n.split(".")[-1]: importlib.import_module(f"kronfluence.{n}") for n in names}
    return SimpleNamespace(**found)


def classification() -> object:
    """A task of kronfluence: the sums of losses, so that gradients are those of single points."""

    class Classification(peer_modules().task.Task):
        """Of labels, or of some that are drawn from the model."""

        def compute_train_loss(
            self, batch: Batch, model: nn.Module, sample: bool = False
        ) -> Tensor:
            """What factors and gradients are those of."""
            x, y = batch
            output = model(x)
            if sample:
                y = torch.multinomial(output.detach().softmax(dim=1), 1).flatten()
            return nn.functional.cross_entropy(output, y, reduction="sum")

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            """The loss here too."""
            return self.compute_train_loss(batch, model)

    return Classification()


class Batches(list[Batch]):
    """Batches, and the `dataset` by which kronfluence counts the points."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        super().__init__(batches)
        self.dataset = torch.cat([y for _, y in self])


class KronfluenceEkfac:
    """The EKFAC of kronfluence, in memory and in float64, with one λ for all layers.

    Factors are means over the points, as in `hessops`, and damped by λ itself; kronfluence's own
    choice, 0.1 times the mean eigenvalue of each layer, is none that other methods could share.

    Args:
        model: A network in float64.
        loss: The cross-entropy.
        damping: λ.
        empirical: Whether labels are those of the points, or drawn from the model.
    """

    def __init__(
        self, model: nn.Module, loss: nn.Module, damping: float, *, empirical: bool
    ) -> None:
        assert isinstance(loss, nn.CrossEntropyLoss)
        self.modules = peer_modules()
        self.damping, self.task = damping, classification()
        dtypes = ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
        self.common = {
            "model": self.modules.analyzer.prepare_model(copy.deepcopy(model), self.task),
            "state": self.modules.state.State(cpu=True),
            "factor_args": self.modules.arguments.FactorArguments(
                strategy="ekfac",
                use_empirical_fisher=empirical,
                covariance_max_examples=None,
                lambda_max_examples=None,
                **{f"{name}_dtype": torch.float64 for name in dtypes},
            ),
            "disable_tqdm": True,
        }

    def fit(self, batches: list[Batch]) -> Self:
        """Factors, their eigenvectors, and the corrected eigenvalues."""
        covariance, eigen = self.modules.covariance, self.modules.eigen
        data = {"task": self.task, "loader": Batches(batches)}
        _, covariances = covariance.fit_covariance_matrices_with_loader(**data, **self.common)
        self.factors = eigen.perform_eigendecomposition(covariances, **self.common)
        _, corrected = eigen.fit_lambda_matrices_with_loader(
            eigen_factors=self.factors, **data, **self.common
        )
        self.factors |= corrected
        return self

    def with_regularization(self, damping: float) -> Self:
        """The same factors."""
        changed = copy.copy(self)
        changed.damping = damping
        return changed

    def influences(self, x_test: Tensor, y_test: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Its pairwise scores, ``(tests, n)``."""
        dtypes = ("per_sample_gradient", "precondition", "score")
        score_args = self.modules.arguments.ScoreArguments(
            damping_factor=self.damping, **{f"{name}_dtype": torch.float64 for name in dtypes}
        )
        scores = self.modules.pairwise.compute_pairwise_scores_with_loaders(
            loaded_factors=self.factors,
            task=self.task,
            query_loader=Batches([(x_test, y_test)]),
            per_device_query_batch_size=len(y_test),
            train_loader=Batches([(x, y)]),
            score_args=score_args,
            tracked_module_names=None,
            **self.common,
        )
        return scores["all_modules"]


# --- the methods -----------------------------------------------------------------------------

# From a model, its loss and a damping to the influence model that is fitted.
METHODS: dict[str, Recipe] = {
    "direct, Hessian": partial(DirectInfluence, second_order_mode=HESSIAN),
    "direct, empirical": partial(DirectInfluence, second_order_mode=EMPIRICAL),
    "harmonic mean, empirical": InverseHarmonicMeanInfluence,
    REFERENCE: partial(DirectInfluence, second_order_mode=GGN),
    "direct, layer by layer": partial(
        DirectInfluence, second_order_mode=GGN, block_structure="layer_wise"
    ),
    "CG": partial(CgInfluence, second_order_mode=GGN),
    "LiSSA, scale='auto'": partial(
        LissaInfluence, second_order_mode=GGN, scale="auto", rtol=1e-2, maxiter=1000
    ),
    "Arnoldi, Woodbury, rank P": partial(
        ArnoldiInfluence, second_order_mode=GGN, rank=FULL, use_woodbury=True
    ),
    "Arnoldi, Woodbury, rank 100": partial(
        ArnoldiInfluence, second_order_mode=GGN, rank=100, use_woodbury=True
    ),
    "Arnoldi, rank 100": partial(ArnoldiInfluence, second_order_mode=GGN, rank=100),
    "Nyström, rank P": partial(NystroemSketchInfluence, second_order_mode=GGN, rank=FULL),
    "Nyström, rank 100": partial(NystroemSketchInfluence, second_order_mode=GGN, rank=100),
    "KFAC": partial(kronecker, update_diagonal=False),
    EKFAC: partial(kronecker, update_diagonal=True),
    f"KFAC, {MONTE_CARLO}": partial(kronecker, update_diagonal=False, fisher_type="monte-carlo"),
    SAMPLED: partial(kronecker, update_diagonal=True, fisher_type="monte-carlo"),
    PEER_SAMPLED: partial(KronfluenceEkfac, empirical=False),
    "KFAC, empirical": partial(kronecker, update_diagonal=False, fisher_type="empirical"),
    LABELS: partial(kronecker, update_diagonal=True, fisher_type="empirical"),
    PEER_LABELS: partial(KronfluenceEkfac, empirical=True),
}


@dataclass(frozen=True)
class Problem:
    """Digits, less the mean of the training points, and random halves of those."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    subsets: Tensor  # (m, n // 2), positions of points

    def sums(self, influences: Tensor) -> Tensor:
        """From ``(tests, n)`` to the sums over each subset, ``(m, tests)``."""
        masks = influences.new_zeros(len(self.subsets), len(self.y))
        return masks.scatter_(1, self.subsets, 1.0) @ influences.T


def problem(points: int, tests: int, subsets: int) -> Problem:
    generator = torch.Generator().manual_seed(MASK_SEED)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=generator)[: points + tests]
    x, y = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)[order]
    x = x - x[:points].mean(dim=0)
    halves = [torch.randperm(points, generator=generator)[: points // 2] for _ in range(subsets)]
    return Problem(x[:points], y[:points], x[points:], y[points:], torch.stack(halves))


# --- training --------------------------------------------------------------------------------


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10)
    return nn.Sequential(*layers).double()


def stacked(networks: Iterable[nn.Module]) -> Parameters:
    states = [network.state_dict() for network in networks]
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def trained(start: Parameters, x: Tensor, y: Tensor, decay: float, steps: int) -> Parameters:
    """Trains k models at once, each on all of its own points, by Nesterov's gradient descent.

    Leaving points out of x is giving them the weight 0 in the loss, at half the price.

    Args:
        start: Parameters, stacked along a first dimension of size k.
        x: ``(k, n, features)``.
        y: ``(k, n)``.
        decay: Weight decay.
        steps: Number of steps.
    """
    skeleton = network(0)

    def objective(parameters: Parameters, x: Tensor, y: Tensor) -> Tensor:
        squares = sum((p**2).sum() for p in parameters.values())
        return LOSS(functional_call(skeleton, parameters, (x,)), y) + decay / 2 * squares

    gradient = vmap(grad(objective))
    state, velocity = start, {name: torch.zeros_like(p) for name, p in start.items()}
    for _ in range(steps):
        slope = gradient(state, x, y)
        velocity = {name: MOMENTUM * velocity[name] + g for name, g in slope.items()}
        state = {
            name: p - LEARNING_RATE * (slope[name] + MOMENTUM * velocity[name])
            for name, p in state.items()
        }
    last = gradient(state, x, y).values()
    norms = torch.cat([g.flatten(1) for g in last], dim=1).norm(dim=1)
    print(f"{len(norms):6} models trained, norm of the last gradient at most {norms.max():.1e}")
    return state


def test_losses(state: Parameters, data: Problem) -> Tensor:
    """The losses of the test points under k stacked models, ``(k, tests)``."""
    skeleton = network(0)

    def losses(parameters: Parameters) -> Tensor:
        output = functional_call(skeleton, parameters, (data.x_test,))
        return nn.functional.cross_entropy(output, data.y_test, reduction="none")

    return vmap(losses)(state)


def measured(data: Problem, seeds: int, decay: float, steps: int) -> Tensor:
    """The losses of the test points under the retrained models, ``(seeds, m, tests)``."""
    pairs = [(seed, half) for seed in range(seeds) for half in data.subsets]
    found = []
    for begin in range(0, len(pairs), STACKED):
        some = pairs[begin : begin + STACKED]
        halves = torch.stack([half for _, half in some])
        start = stacked(network(seed) for seed, _ in some)
        state = trained(start, data.x[halves], data.y[halves], decay, steps)
        found.append(test_losses(state, data))
    return torch.cat(found).reshape(seeds, len(data.subsets), -1)


def explained(data: Problem, models: int, decay: float, steps: int) -> list[nn.Module]:
    """Models trained on all points."""
    networks = [network(FIRST_EXPLAINED + k) for k in range(models)]
    x, y = data.x.expand(models, -1, -1), data.y.expand(models, -1)
    state = trained(stacked(networks), x, y, decay, PATIENCE * steps)
    for k, model in enumerate(networks):
        model.load_state_dict({name: p[k] for name, p in state.items()})
    return networks


# --- scores ----------------------------------------------------------------------------------


def lds(predictions: Tensor, measurements: Tensor) -> float:
    """The mean over the columns of Spearman's correlation over the rows."""
    ranks = [rankdata(values.numpy(), axis=0) for values in (predictions, measurements)]
    first, second = (rank - rank.mean(axis=0) for rank in ranks)
    norms = np.linalg.norm(first, axis=0) * np.linalg.norm(second, axis=0)
    return float(((first * second).sum(axis=0) / norms).mean())


def standard_error(predictions: Tensor, measurements: Tensor) -> float:
    """Of the LDS, by a bootstrap over the subsets."""
    generator = torch.Generator().manual_seed(SKETCH_SEED)
    count = len(measurements)
    draws = torch.randint(count, (RESAMPLES, count), generator=generator)
    return float(np.std([lds(predictions[rows], measurements[rows]) for rows in draws]))


def split_half(losses: Tensor) -> float:
    """The LDS between the means over two halves of the seeds, over the ways to halve them."""
    seeds = range(len(losses))
    found = []
    for half in combinations(seeds, len(losses) // 2):
        rest = [seed for seed in seeds if seed not in half]
        # Either half of an even number of seeds comes up; once is enough.
        if 2 * len(half) < len(losses) or 0 in half:
            found.append(lds(losses[list(half)].mean(dim=0), losses[rest].mean(dim=0)))
    return float(np.mean(found))


def dot_products(models: list[nn.Module], data: Problem) -> Tensor:
    total = torch.zeros(len(data.y_test), len(data.y), dtype=data.x.dtype)
    for model in models:
        provider = CgInfluence(model, LOSS).fit([(data.x, data.y)]).gradient_provider
        rows, columns = (data.x_test, data.y_test), (data.x, data.y)
        total += provider.flat_grads(*rows) @ provider.flat_grads(*columns).T
    return total / len(models)


@dataclass
class Sweep:
    """Influences by one method, by damping, as means over the models; ``(tests, n)``.

    Attributes:
        influences: Damping -> influences; without those of which there are none.
        remarks: Damping -> what is to be said.
    """

    influences: dict[float, Tensor]
    remarks: dict[float, str]


def smallest_eigenvalue(fit: Explanation) -> float:
    """Of the undamped matrix of a direct solve; 0 for other methods, which check for themselves."""
    if not isinstance(fit, DirectInfluence):
        return 0.0
    blocks = fit.fitted.blocks.values()
    return min(float(torch.linalg.eigvalsh(block.kept.to_dense())[0]) for block in blocks)


def swept(
    recipe: Recipe,
    models: list[nn.Module],
    data: Problem,
    dampings: list[float],
    seed: int = SKETCH_SEED,
) -> Sweep:
    fits = []
    for model in models:
        torch.manual_seed(seed)
        fits.append(recipe(model, LOSS, max(dampings)).fit([(data.x, data.y)]))
    smallest = min(smallest_eigenvalue(fit) for fit in fits)
    sweep = Sweep({}, {})
    for damping in dampings:
        if smallest + damping <= 0:
            sweep.remarks[damping] = "indefinite"
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            try:
                found = [
                    fit.with_regularization(damping).influences(
                        data.x_test, data.y_test, data.x, data.y
                    )
                    for fit in fits
                ]
            except SolverError:
                sweep.remarks[damping] = "failed"
                continue
        sweep.influences[damping] = torch.stack(found).mean(dim=0)
        if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
            sweep.remarks[damping] = "~"
    return sweep


# --- the table -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What the table says of one method.

    Attributes:
        name: Of the method.
        scores: Damping -> LDS, a mean where labels are drawn.
        spreads: Damping -> its standard deviation over the draws, where labels are drawn.
        errors: Damping -> standard error of the LDS, of the first draw.
        remarks: Damping -> what is to be said.
        own: The damping that belongs to the training.
        seconds: For all models and dampings, and one draw.
    """

    name: str
    scores: dict[float, float]
    spreads: dict[float, float]
    errors: dict[float, float]
    remarks: dict[float, str]
    own: float
    seconds: float

    def __str__(self) -> str:
        cells = []
        for damping in {**self.scores, **self.remarks}:
            score, remark = self.scores.get(damping), self.remarks.get(damping, "")
            cells.append((damping, remark if score is None else f"{remark}{score:.3f}"))
        error = f"{self.errors[self.own]:.3f}" if self.own in self.errors else ""
        line = (
            f"{self.name:34}"
            + "".join(f"{cell:>12}" for _, cell in sorted(cells))
            + f"{error:>8}{self.seconds:8.1f}"
        )
        if self.spreads:
            spreads = "".join(f"{'± ' + format(s, '.3f'):>12}" for s in self.spreads.values())
            line += f"\n{'':34}{spreads}"
        return line


def row(
    name: str, sweeps: list[Sweep], data: Problem, losses: Tensor, own: float, seconds: float
) -> Row:
    """Of one sweep, or one for each draw of labels."""
    predictions = [
        {damping: -data.sums(found) for damping, found in sweep.influences.items()}
        for sweep in sweeps
    ]
    first = predictions[0]
    scores = {damping: [lds(p[damping], losses) for p in predictions] for damping in first}
    return Row(
        name,
        {damping: float(np.mean(found)) for damping, found in scores.items()},
        {d: float(np.std(found, ddof=1)) for d, found in scores.items() if len(found) > 1},
        {damping: standard_error(found, losses) for damping, found in first.items()},
        sweeps[0].remarks,
        own,
        seconds,
    )


def described(data: Problem, arguments: argparse.Namespace) -> str:
    n, m, half = len(data.y), *data.subsets.shape
    size = sum(p.numel() for p in network(0).parameters())
    return (
        f"digits, 64-{WIDTH}-10 tanh network, P = {size}, float64, one thread; n = {n} training "
        f"points, {len(data.y_test)} test points\n"
        f"{m} random subsets of {half} points (mask seed {MASK_SEED}), each retrained from "
        f"{arguments.seeds} seeds (0 to {arguments.seeds - 1})\n"
        f"scores are means over {arguments.models} models trained on all points (seeds from "
        f"{FIRST_EXPLAINED} on); sketches and bootstrap have seed {SKETCH_SEED}\n"
        f"{arguments.steps} full-batch steps of Nesterov's method, learning rate {LEARNING_RATE}, "
        f"momentum {MOMENTUM}, weight decay c = {arguments.decay:g};\n"
        f"{PATIENCE * arguments.steps} steps for the models that are explained"
    )


def reported_ceiling(losses: Tensor) -> None:
    r = split_half(losses)
    reliability = max(0.0, 2 * r / (1 + r))
    print(
        f"ceiling: split-half r = {r:.3f}, reliability 2r / (1 + r) = {reliability:.3f}, "
        f"its square root {reliability**0.5:.3f}"
    )


def disagreements(rows: dict[str, Row]) -> list[str]:
    """Where an exact inverse does not have the score of the direct solve."""
    found = []
    for name in EXACT:
        for damping, expected in rows[REFERENCE].scores.items():
            score = rows[name].scores.get(damping)
            if score is None or not abs(score - expected) <= TOLERANCE:
                found.append(f"{name} at λ = {damping:g}: {score}, direct {expected:.3f}")
    return found


def shortfalls(rows: dict[str, Row]) -> list[str]:
    """Where EKFAC is not what kronfluence has, or worse."""
    labels, sampled = rows[PEER_LABELS], rows[PEER_SAMPLED]
    found = []
    for damping, expected in labels.scores.items():
        score = rows[LABELS].scores[damping]
        if not abs(score - expected) <= CLOSE:
            found.append(f"{LABELS} at λ = {damping:g}: {score:.4f}, kronfluence {expected:.4f}")
    for damping, other in sampled.scores.items():
        for name, allowed in ((SAMPLED, TOLERANCE), (EKFAC, sampled.errors[damping])):
            score = rows[name].scores[damping]
            if not score >= other - allowed:
                found.append(
                    f"{name} at λ = {damping:g}: {score:.3f}, less than {other:.3f} of "
                    f"kronfluence with sampled labels by more than {allowed:.3f}"
                )
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # Each with its value for --quick.
    sizes = {
        "points": (500, 200),
        "subsets": (100, 50),
        "seeds": (4, 2),
        "models": (3, 1),
        "tests": (50, 30),
        "steps": (800, 400),
    }
    for name, (default, quick) in sizes.items():
        parser.add_argument(f"--{name}", type=int, help=f"{default}, or {quick} with --quick")
    parser.add_argument("--decay", type=float, default=0.003, help="c, 0.003")
    parser.add_argument("--quick", action="store_true", help="a smaller run, of under a minute")
    arguments = parser.parse_args()
    for name, (default, quick) in sizes.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else default)
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2, for the ceiling")
    return arguments


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    # What stops short is marked in the table.
    logging.getLogger("hessops").setLevel(logging.CRITICAL)
    # Deprecated parts of torch that kronfluence uses.
    warnings.filterwarnings("ignore", category=FutureWarning)
    began = time.perf_counter()
    data = problem(arguments.points, arguments.tests, arguments.subsets)
    print(described(data, arguments))
    by_seed = measured(data, arguments.seeds, arguments.decay, arguments.steps)
    losses = by_seed.mean(dim=0)
    models = explained(data, arguments.models, arguments.decay, arguments.steps)
    print(f"training took {time.perf_counter() - began:.0f} s; mean test loss {losses.mean():.3f}")
    reported_ceiling(by_seed)

    dampings = [factor * arguments.decay for factor in FACTORS]
    heads = "".join(f"{f'λ = {damping:g}':>12}" for damping in dampings)
    print(f"\n{'LDS':34}{heads}{'s.e.*':>8}{'s':>8}")
    start = time.perf_counter()
    products = -data.sums(dot_products(models, data))
    seconds = time.perf_counter() - start
    score, error = lds(products, losses), standard_error(products, losses)
    print(f"{BASELINE:34}{score:12.3f}{'':36}{error:8.3f}{seconds:8.1f}")
    rows: dict[str, Row] = {}
    has_peer = importlib.util.find_spec("kronfluence") is not None
    for name, recipe in METHODS.items():
        if name in (PEER_SAMPLED, PEER_LABELS) and not has_peer:
            print(f"{name:34}  not installed")
            continue
        seeds = [SKETCH_SEED + k for k in range(DRAWS if name.endswith(MONTE_CARLO) else 1)]
        start = time.perf_counter()
        sweeps = [swept(recipe, models, data, dampings, seed) for seed in seeds]
        seconds = (time.perf_counter() - start) / len(seeds)
        rows[name] = row(name, sweeps, data, losses, arguments.decay, seconds)
        print(rows[name], flush=True)
    print("curvature: generalized Gauss-Newton where none is named. * at λ = c.")
    print(
        "Monte Carlo: that with one label a point, drawn from the model; means and standard "
        f"deviations\nof {DRAWS} draws, seconds of one."
    )
    print("~: stopped short of its tolerance. indefinite: A + λI is, for one of the models.")
    print(f"the whole run took {time.perf_counter() - began:.0f} s")

    wrong = disagreements(rows)
    if wrong:
        raise SystemExit("\n".join(["exact inverses that differ from the direct solve:", *wrong]))
    print(f"CG and low rank at rank P: within {TOLERANCE} of the direct solve at every damping")
    if not has_peer:
        return
    wrong = shortfalls(rows)
    if wrong:
        raise SystemExit("\n".join(["EKFAC that falls short of kronfluence's:", *wrong]))
    print(
        f"EKFAC: within {CLOSE:g} of kronfluence's with the empirical Fisher matrix, not below it "
        f"by more\nthan {TOLERANCE} with sampled labels, nor with type-2 by more than a standard "
        "error, at every damping"
    )


if __name__ == "__main__":
    main()
