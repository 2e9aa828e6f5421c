"""Damped systems of the digits network for the gradients of 64 test points.

What is measured, and what the tables show, is in `DESCRIPTION`.

    python benchmarks/solves.py [--quick] [--rounds 5] [--threads 2]

The other libraries are in the dependency group `benchmarks`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from _cases import DIGITS, LOSS, Batch, Case, case, gradients, train
from _harness import OURS, Call, Comparison, Contender, Report, Way, grouped, run
from _peers import (
    CURVLINOPS,
    DATTRI,
    EMPIRICAL,
    GGN,
    HESSIAN,
    PYDVL,
    curvlinops_shifted,
    installed,
    loss_of_flat_parameters,
    pydvl,
    pydvl_operator,
)
from _reference import reference
from torch import Tensor

from hessops import (
    CgOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    NystroemPreconditioner,
)
from hessops.functional import operator_spectral_approximation
from hessops.operators.curvature import CurvatureOperator

DESCRIPTION = """\
Solving $(A + 0.01\\,I)\\,x = b$ for 64 right-hand sides b, the gradients of the losses of 64 test
points, until the *true* relative residual of every one of them is at most 1e-4. The residual is
that of a float64 product and is the worst of the 64; a solve that misses 1e-4 is marked wrong. The
network is trained until the Hessian plus 0.01 is positive definite. Each library is asked for the
loosest tolerance of its own with which it gets there: pyDVL compares the norm of a residual with
rtol² ‖b‖, curvlinops a mean norm over the right-hand sides with its tolerance, and dattri makes as
many steps as it is told.

Everything is made anew in every round: operator, checks of the data, graphs that are retained,
preconditioner, solve. Where the preconditioner is *kept*, it is one that an earlier solve has
fitted. *Sample space* is `A.shift(0.01).inverse()`, an exact solve by the Gram matrix of gradients,
factorisation included."""

DAMPING, RTOL = 0.01, 1e-4
RIGHT_HAND_SIDES, STEPS, RANK = 64, 200, 50
# Points of the system with the GGN, whose Gram matrix has ten rows a point.
GGN_POINTS = 350
# What each library is asked for, so that the worst true residual is at most RTOL. Found by trials.
OUR_RTOL = RTOL
PYDVL_RTOL = 1.2e-2
PYDVL_PRECONDITIONED_RTOL = 9e-3
CURVLINOPS_TOLERANCE = {HESSIAN: 6e-5, GGN: 6e-5, EMPIRICAL: 6e-5}
DATTRI_STEPS = 28

MATRICES: dict[str, type[CurvatureOperator]] = {
    HESSIAN: HessianOperator,
    GGN: GeneralizedGaussNewtonOperator,
    EMPIRICAL: GaussNewtonOperator,
}


@dataclass(frozen=True)
class System:
    """(A + λI) x = b.

    Attributes:
        matrix: The name of A.
        data: Model and data.
        rhs: ``(k, P)``.
    """

    matrix: str
    data: Case
    rhs: Tensor

    def operator(self) -> CurvatureOperator:
        """A, made anew."""
        return MATRICES[self.matrix](self.data.model, LOSS, self.data.batches)

    def residual(self, answer: Tensor) -> float:
        """The worst true relative residual."""
        found = answer.detach()
        worst = 0.0
        for x, b in zip(found, self.rhs.double(), strict=True):
            image = reference(self.matrix, self.data, x) + DAMPING * x.double()
            relative = ((b - image).norm() / b.norm()).item()
            # `max` would drop NaN.
            worst = relative if not relative <= worst else worst
        return worst


# --- hessops ---------------------------------------------------------------------------------


def ours(system: System, *, rank: int | None, kept: bool = False) -> Call:
    """Block CG; the preconditioner is fitted in every solve or before the first."""
    recipe = None if rank is None else NystroemPreconditioner(rank=rank)
    fitted = recipe.fit(system.operator(), DAMPING) if kept and recipe is not None else recipe

    def solve() -> Tensor:
        inverse = CgOperator(
            system.operator(), DAMPING, rtol=OUR_RTOL, preconditioner=fitted, use_block_cg=True
        )
        return inverse.solve(system.rhs).value

    return solve


def in_sample_space(system: System) -> Call:
    return lambda: system.operator().shift(DAMPING).inverse().apply(system.rhs)


# --- peers -----------------------------------------------------------------------------------


def pydvl_block_cg(
    system: System, batches: list[Batch], *, rank: int | None, kept: bool = False
) -> Call:
    def fitted() -> object:
        if rank is None:
            return None
        preconditioner = pydvl("preconditioner").NystroemPreconditioner(rank)
        preconditioner.fit(pydvl_operator(system.matrix, system.data, batches), DAMPING)
        return preconditioner

    before = fitted() if kept else None
    rtol = PYDVL_RTOL if rank is None else PYDVL_PRECONDITIONED_RTOL

    def solve() -> Tensor:
        inverse = pydvl("operator").CgOperator(
            pydvl_operator(system.matrix, system.data, batches),
            regularization=DAMPING,
            rtol=rtol,
            atol=0.0,
            preconditioner=before if kept else fitted(),
            use_block_cg=True,
        )
        return inverse.apply(system.rhs)

    return solve


def curvlinops_cg(system: System, batches: list[Batch]) -> Call:
    library = importlib.import_module("curvlinops")

    def solve() -> Tensor:
        inverse = library.CGInverseLinearOperator(
            curvlinops_shifted(system.matrix, system.data, batches, DAMPING),
            tolerance=CURVLINOPS_TOLERANCE[system.matrix],
            max_iter=5000,
            max_tridiag_iter=0,
        )
        return (inverse @ system.rhs.T).T

    return solve


def dattri_cg(system: System) -> Call:
    hessian = importlib.import_module("dattri.func.hessian")
    loss, flat = loss_of_flat_parameters(system.data)
    settings = {"max_iter": DATTRI_STEPS, "regularization": DAMPING}
    return lambda: hessian.ihvp_at_x_cg(loss, flat, **settings)(system.rhs)


def ways(system: System, make: Callable[[System, list[Batch]], Call]) -> list[Way]:
    """With the batches of `hessops`, and with all data in one."""
    data = system.data
    return [
        Way("one batch", partial(make, system, data.full_batch)),
        Way(f"batches of {data.batch_size}", partial(make, system, data.batches)),
    ]


def contenders(system: System) -> Iterator[Contender]:
    sketch = f"Nyström of rank {RANK}"
    yield Contender(OURS, "block CG", [Way("", partial(ours, system, rank=None))])
    yield Contender(OURS, f"block CG, {sketch}", [Way("", partial(ours, system, rank=RANK))])
    kept = Way("", partial(ours, system, rank=RANK, kept=True))
    yield Contender(OURS, f"block CG, {sketch}, kept", [kept])
    if system.matrix != HESSIAN:
        yield Contender(OURS, "sample space", [Way("", partial(in_sample_space, system))])
    if installed(PYDVL) and system.matrix != GGN:
        yield from pydvl_contenders(system, sketch)
    if installed(CURVLINOPS):
        yield Contender(CURVLINOPS, "CG", ways(system, curvlinops_cg))
    if installed(DATTRI) and system.matrix == HESSIAN:
        yield Contender(DATTRI, "CG", [Way("one batch", partial(dattri_cg, system))])


def pydvl_contenders(system: System, sketch: str) -> Iterator[Contender]:
    plain = ways(system, partial(pydvl_block_cg, rank=None))
    yield Contender(PYDVL, "block CG", plain)
    if system.matrix == HESSIAN:
        fitted = ways(system, partial(pydvl_block_cg, rank=RANK))
        yield Contender(PYDVL, f"block CG, {sketch}", fitted)
        kept = ways(system, partial(pydvl_block_cg, rank=RANK, kept=True))
        yield Contender(PYDVL, f"block CG, {sketch}, kept", kept)


# --- measurement -----------------------------------------------------------------------------


def smallest_eigenvalue(data: Case) -> float:
    """Of the Hessian: that of the largest absolute value once a larger multiple of I is taken."""
    hessian = HessianOperator(data.model, LOSS, data.batches)
    largest = operator_spectral_approximation(hessian, 1, tol=1e-3).eigen_vals[0].abs().item()
    below = operator_spectral_approximation(hessian.shift(-largest), 1, tol=1e-4)
    return below.eigen_vals[0].item() + largest


def trained_digits() -> Case:
    """The digits network at parameters where H + λI is positive definite.

    Raises:
        RuntimeError: It is not after many steps.
    """
    data = case(DIGITS)
    for _ in range(5):
        train(data, STEPS)
        smallest = smallest_eigenvalue(data)
        print(f"smallest eigenvalue of the Hessian: {smallest:.2e}", flush=True)
        if smallest > -0.9 * DAMPING:
            return data
    raise RuntimeError(f"the Hessian still has the eigenvalue {smallest:.2e}: train it longer")


def systems(*, quick: bool) -> Iterator[System]:
    data = trained_digits()
    count = 8 if quick else RIGHT_HAND_SIDES
    rhs = gradients(data, data.x_test[:count], data.y_test[:count])
    for matrix in MATRICES:
        points = data.fewer(GGN_POINTS) if matrix == GGN else data
        yield System(matrix, points, rhs)


def measure(report: Report) -> None:
    """All systems, one after the other."""
    for system in systems(quick=report.effort.quick):
        comparison = Comparison(
            system.data.gradient, report.effort, error=system.residual, accepted=RTOL
        )
        measured = comparison.measure(contenders(system))
        report.add(measured, matrix=system.matrix, points=len(system.data))
        title = (
            f"{system.matrix} + {DAMPING} I: {grouped(system.data.size)} parameters, "
            f"{len(system.data)} points, {len(system.rhs)} right-hand sides"
        )
        report.detail(title, measured, error="true residual")


if __name__ == "__main__":
    run("solves", "Solves", DESCRIPTION, measure, patience=10.0)
