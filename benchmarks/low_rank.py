"""Leading eigenpairs and Nyström sketches of Hessians.

What is measured, and what the tables show, is in `DESCRIPTION`.

    python benchmarks/low_rank.py [--quick] [--rounds 5] [--threads 2]

The other libraries are in the dependency group `benchmarks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy
import torch
from _cases import DIGITS, LOSS, WIDE, Batch, Case, case, train
from _harness import OURS, Call, Comparison, Contender, Report, Way, run
from _peers import CURVLINOPS, HESSIAN, PYDVL, curvlinops_operator, installed, pydvl, pydvl_operator
from _reference import reference
from scipy.sparse.linalg import eigsh
from torch import Tensor

from hessops import HessianOperator
from hessops.functional import (
    operator_nystroem_approximation,
    operator_spectral_approximation,
)

DESCRIPTION = """\
The 10 eigenpairs of largest absolute value of the Hessian by Lanczos' method, all to a relative
tolerance of 1e-4, and a randomized Nyström sketch of rank 50. Operators are made anew in every
round. The error of eigenpairs is the largest ‖H v − d v‖ / |d| of the ten with the products in
float64; above 1e-2 they are marked wrong. That of a sketch is ‖H w − U Σ Uᵀ w‖ / ‖H w‖ for a random
w, which the sketch has not seen: what it leaves out depends on the rank and is not marked. A
Hessian has negative eigenvalues, of which a sketch knows nothing."""

TOLERANCE, ACCEPTED = 1e-4, 1e-2
PAIRS, RANK = 10, 50
# Of the digits network: at the start its Hessian has few large eigenvalues.
STEPS = 50

Approximation = tuple[Tensor, Tensor]


# --- errors ----------------------------------------------------------------------------------


def residual(data: Case, answer: Approximation) -> float:
    """The worst of the eigenpairs."""
    values, columns = answer[0].double(), answer[1].double()
    worst = 0.0
    for value, column in zip(values, columns.T, strict=True):
        image = reference(HESSIAN, data, column)
        relative = ((image - value * column).norm() / (value.abs() * column.norm())).item()
        # `max` would drop NaN.
        worst = relative if not relative <= worst else worst
    return worst if len(values) == PAIRS else float("nan")


def left_out(data: Case, answer: Approximation) -> float:
    """What a sketch misses of a random product."""
    values, columns = answer[0].double(), answer[1].double()
    probe = data.vectors(1)[0]
    image = reference(HESSIAN, data, probe)
    sketched = columns @ (values * (columns.T @ probe.double()))
    return ((image - sketched).norm() / image.norm()).item()


# --- eigenpairs ------------------------------------------------------------------------------


def our_pairs(data: Case) -> Call:
    def find() -> Approximation:
        hessian = HessianOperator(data.model, LOSS, data.batches)
        found = operator_spectral_approximation(hessian, PAIRS, tol=TOLERANCE)
        return found.eigen_vals, found.projections

    return find


def pydvl_pairs(data: Case, batches: list[Batch]) -> Call:
    def find() -> Approximation:
        hessian = pydvl_operator(HESSIAN, data, batches)
        found = pydvl("functional").operator_spectral_approximation(hessian, PAIRS, tol=TOLERANCE)
        return found.eigen_vals, found.projections

    return find


def scipy_pairs(data: Case, batches: list[Batch]) -> Call:
    def find() -> Approximation:
        hessian = curvlinops_operator(HESSIAN, data, batches).to_scipy(numpy.float32)
        values, columns = eigsh(hessian, k=PAIRS, which="LM", tol=TOLERANCE)
        return torch.from_numpy(values), torch.from_numpy(columns)

    return find


def pair_contenders(data: Case) -> Iterator[Contender]:
    yield Contender(OURS, "Lanczos", [Way("", partial(our_pairs, data))])
    if installed(PYDVL):
        yield Contender(PYDVL, "Lanczos", ways(data, pydvl_pairs))
    if installed(CURVLINOPS):
        yield Contender(CURVLINOPS, "eigsh of scipy", ways(data, scipy_pairs))


# --- sketches --------------------------------------------------------------------------------


def our_sketch(data: Case) -> Call:
    def find() -> Approximation:
        hessian = HessianOperator(data.model, LOSS, data.batches)
        found = operator_nystroem_approximation(hessian, RANK)
        return found.eigen_vals, found.projections

    return find


def pydvl_sketch(data: Case, batches: list[Batch]) -> Call:
    def find() -> Approximation:
        hessian = pydvl_operator(HESSIAN, data, batches)
        found = pydvl("functional").operator_nystroem_approximation(hessian, RANK)
        return found.eigen_vals, found.projections

    return find


def sketch_contenders(data: Case) -> Iterator[Contender]:
    yield Contender(OURS, f"Nyström of rank {RANK}", [Way("", partial(our_sketch, data))])
    if installed(PYDVL):
        yield Contender(PYDVL, f"Nyström of rank {RANK}", ways(data, pydvl_sketch))


def ways(data: Case, make: Callable[[Case, list[Batch]], Call]) -> list[Way]:
    """With the batches of `hessops`, and with all data in one."""
    return [
        Way("one batch", partial(make, data, data.full_batch)),
        Way(f"batches of {data.batch_size}", partial(make, data, data.batches)),
    ]


# --- measurement -----------------------------------------------------------------------------


def measure(report: Report) -> None:
    """Both networks."""
    for name in [DIGITS] if report.effort.quick else [DIGITS, WIDE]:
        data = case(name)
        train(data, STEPS)
        pairs = Comparison(
            data.gradient, report.effort, error=partial(residual, data), accepted=ACCEPTED
        )
        measured = pairs.measure(pair_contenders(data))
        report.add(measured, case=name, what="eigenpairs")
        report.detail(f"{name}: {PAIRS} leading eigenpairs", measured)
        sketches = Comparison(data.gradient, report.effort, error=partial(left_out, data))
        measured = sketches.measure(sketch_contenders(data))
        report.add(measured, case=name, what="sketch")
        report.detail(f"{name}: a sketch of {RANK} columns", measured)


if __name__ == "__main__":
    run("low_rank", "Eigenpairs and sketches", DESCRIPTION, measure, patience=5.0)
