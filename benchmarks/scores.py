"""Inner products of factors with the gradients of points.

What is measured, and what the tables show, is in `DESCRIPTION`.

    python benchmarks/scores.py [--quick] [--rounds 5] [--threads 2]

The other libraries are in the dependency group `benchmarks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from _cases import DIGITS, LOSS, WIDE, Case, case, gradients
from _harness import OURS, Call, Comparison, Contender, Report, Way, run
from _peers import PYDVL, installed, pydvl
from _reference import relative_error
from torch import Tensor

from hessops import Objective
from hessops.influence import CgInfluence, GradientProvider

DESCRIPTION = """\
Scores of factors F ``(m, P)`` and n points with the gradients G ``(n, P)``: the matrix F Gᵀ, which
is what influences of training points are made of. The unit is the **bare matrix product** F Gᵀ in
float32 with G in memory already, which costs n·P numbers; the others are given the model and the
points. *jacobian_prod* is of the gradient provider of each library, *influences_from_factors* of a
fitted influence model. The error is relative, against float64; above 1e-3 it is marked wrong."""

ACCEPTED = 1e-3
# Case -> factors, points.
SIZES = {DIGITS: (64, 1400), WIDE: (16, 256)}


def ours(data: Case, factors: Tensor) -> Call:
    provider = GradientProvider(Objective(data.model, LOSS))
    return partial(provider.jacobian_prod, data.x, data.y, factors)


def our_influences(data: Case, factors: Tensor) -> Call:
    influence = CgInfluence(data.model, LOSS, 0.01).fit(data.batches)
    return partial(influence.influences_from_factors, factors, data.x, data.y)


def bare(rows: Tensor, factors: Tensor) -> Tensor:
    return factors @ rows.T


def pydvl_product(data: Case, factors: Tensor) -> Call:
    library = pydvl("base")
    # Without parameters of its own it takes blocks of them, which this product does not.
    params = dict(data.model.named_parameters())
    provider = library.TorchGradientProvider(data.model, LOSS, params)
    batch = library.TorchBatch(data.x, data.y)
    return partial(provider.jacobian_prod, batch, factors)


def contenders(data: Case, factors: Tensor, rows: Tensor) -> Iterator[Contender]:
    yield Contender(OURS, "jacobian_prod", [Way("", partial(ours, data, factors))])
    yield Contender(
        OURS, "influences_from_factors", [Way("", partial(our_influences, data, factors))]
    )
    if installed(PYDVL):
        yield Contender(PYDVL, "jacobian_prod", [Way("", partial(pydvl_product, data, factors))])
    yield Contender("torch", "bare product", [Way("", lambda: partial(bare, rows, factors))])


def measure(report: Report) -> None:
    """Both networks."""
    for name in [DIGITS] if report.effort.quick else SIZES:
        count, points = SIZES[name]
        data = case(name).fewer(points)
        factors, rows = data.vectors(count), gradients(data, data.x, data.y)
        expected = torch.cat([factors.double() @ r.double().T for r in rows.split(64)], dim=1)
        comparison = Comparison(
            partial(bare, rows, factors),
            report.effort,
            error=lambda answer, right=expected: relative_error(answer, right),
            accepted=ACCEPTED,
        )
        measured = comparison.measure(contenders(data, factors, rows))
        report.add(measured, case=name, factors=count, points=points)
        title = f"{name}: {count} factors, {points} points"
        report.detail(title, measured, unit="bare products")


if __name__ == "__main__":
    run("scores", "Scores", DESCRIPTION, measure)
