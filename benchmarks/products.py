"""Products with the Hessian, the GGN, the empirical Gauss-Newton matrix and the harmonic mean.

python benchmarks/products.py [--quick] [--rounds 5] [--threads 2]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from _cases import DIGITS, LOSS, RECIPES, WIDE, Batch, Case, case
from _harness import (
    OURS,
    Call,
    Comparison,
    Contender,
    Measurement,
    Report,
    Way,
    grouped,
    number,
    run,
)
from _peers import (
    CURVLINOPS,
    DATTRI,
    EMPIRICAL,
    GGN,
    HARMONIC,
    HESSIAN,
    PYDVL,
    REGULARIZATION,
    curvlinops_operator,
    dattri_product,
    installed,
    pydvl_operator,
)
from _reference import reference, relative_error
from torch import Tensor

from hessops import (
    BatchOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    InverseHarmonicMeanOperator,
)
from hessops.operators.curvature import CurvatureOperator

DESCRIPTION = """\
Gradients **per vector** of products with one vector and with stacks of them. *Fixed θ* is what a
solver does: successive products at the same parameters, by `operator.linearize()` of `hessops` and
`hvp_at_x` of dattri, which keep the graph of the gradient. The set-up of `hessops` is everything
before its first product at fixed parameters, in gradients: the copy of the model, the checks of the
data and the graphs. *Plain* products keep nothing, and pyDVL and curvlinops have no other. Products
with one vector are measured in a row, eight for {full} and two for the others, against as many
gradients. An answer is wrong if its relative error against the same product in float64 is above
{accepted:g}; the harmonic mean has λ = {regularization}. The last column is the time of the fastest
other library with a right answer, divided by that of the faster of the two ways of `hessops` in the
same rounds."""

MATRICES: dict[str, type[CurvatureOperator]] = {
    HESSIAN: HessianOperator,
    GGN: GeneralizedGaussNewtonOperator,
    EMPIRICAL: GaussNewtonOperator,
}
# The largest relative error of a right product in float32.
ACCEPTED = 1e-3
# Numbers of vectors where there are more than two.
COUNTS = {DIGITS: (1, 8, 32), WIDE: (1, 8, 32)}
# Products in a row are counted in vectors, and there are fewer for larger cases.
RUN, SHORT_RUN = 8, 2
# What a peer may use for the gradients of the points of a batch.
GRADIENT_BYTES = 2**31
PLAIN, FIXED = "plain", "fixed θ"


@dataclass(frozen=True)
class Quantity:
    """What is measured of a case.

    Attributes:
        matrix: Its name.
        count: Number of vectors.
    """

    matrix: str
    count: int


def quantities(name: str, *, quick: bool) -> list[Quantity]:
    """All of them for the two cases that are compared in full."""
    if quick:
        return [Quantity(matrix, k) for matrix in (*MATRICES, HARMONIC) for k in (1, 8)]
    found = [Quantity(matrix, k) for matrix in MATRICES for k in COUNTS.get(name, (1, 4))]
    if name in COUNTS:
        found += [Quantity(HARMONIC, k) for k in (1, 32)]
    return found


# --- contenders ------------------------------------------------------------------------------


def ours(matrix: str, data: Case, vectors: Tensor, *, fixed: bool) -> Call:
    operator: BatchOperator
    if matrix == HARMONIC:
        operator = InverseHarmonicMeanOperator(data.model, LOSS, data.batches, REGULARIZATION)
    else:
        operator = MATRICES[matrix](data.model, LOSS, data.batches)
    # The first pass checks the data, which is no part of a product.
    operator.check_data()
    kept = operator.linearize() if fixed else operator
    return partial(kept.apply, vectors)


def pydvl(matrix: str, data: Case, vectors: Tensor, batches: list[Batch]) -> Call:
    return partial(pydvl_operator(matrix, data, batches).apply, vectors)


def curvlinops(matrix: str, data: Case, vectors: Tensor, batches: list[Batch]) -> Call:
    operator, columns = curvlinops_operator(matrix, data, batches), vectors.T
    return lambda: (operator @ columns).T


def dattri(data: Case, vectors: Tensor, mode: str) -> Call:
    return partial(dattri_product(data, mode), vectors)


def contenders(matrix: str, data: Case, vectors: Tensor) -> Iterator[Contender]:
    plain = Way("", partial(ours, matrix, data, vectors, fixed=False))
    yield Contender(OURS, PLAIN, [plain])
    if matrix != HARMONIC:
        yield Contender(OURS, FIXED, [Way("", partial(ours, matrix, data, vectors, fixed=True))])
    if installed(PYDVL) and matrix != GGN:
        yield Contender(PYDVL, "", list(ways(pydvl, matrix, data, vectors)))
    if installed(CURVLINOPS) and matrix != HARMONIC:
        yield Contender(CURVLINOPS, "", list(ways(curvlinops, matrix, data, vectors)))
    if installed(DATTRI) and matrix == HESSIAN:
        modes = ("rev-rev", "rev-fwd")
        found = [Way(f"{mode}, one batch", partial(dattri, data, vectors, mode)) for mode in modes]
        yield Contender(DATTRI, FIXED, found)


def ways(
    make: Callable[[str, Case, Tensor, list[Batch]], Call],
    matrix: str,
    data: Case,
    vectors: Tensor,
) -> Iterator[Way]:
    """With the batches of `hessops`, and with all data in one."""
    yield Way(f"batches of {data.batch_size}", partial(make, matrix, data, vectors, data.batches))
    # pyDVL makes the gradients of all points of a batch.
    by_point = make is pydvl and matrix in (EMPIRICAL, HARMONIC)
    too_large = by_point and 4 * len(data) * data.size > GRADIENT_BYTES
    if data.batch_size < len(data) and not too_large:
        yield Way("one batch", partial(make, matrix, data, vectors, data.full_batch))


# --- measurement -----------------------------------------------------------------------------


def measure_case(report: Report, data: Case) -> list[tuple[Quantity, list[Measurement]]]:
    found = []
    expected: dict[str, Tensor] = {}
    for quantity in quantities(data.name, quick=report.effort.quick):
        matrix, count = quantity.matrix, quantity.count
        vectors = data.vectors(32)[:count]
        if matrix not in expected:
            expected[matrix] = reference(matrix, data, vectors[0])
        comparison = Comparison(
            data.gradient,
            report.effort,
            error=lambda answer, right=expected[matrix]: relative_error(answer[0], right),
            accepted=ACCEPTED,
            calls=max(1, (RUN if data.name in COUNTS else SHORT_RUN) // count),
            parts=count,
        )
        measured = comparison.measure(contenders(matrix, data, vectors))
        report.add(measured, case=data.name, matrix=matrix, vectors=count)
        found.append((quantity, measured))
    return found


def tabulate(report: Report, data: Case, found: list[tuple[Quantity, list[Measurement]]]) -> None:
    title = (
        f"{data.name}: {grouped(data.size)} parameters, {len(data)} points, "
        f"batches of {data.batch_size}"
    )
    names = list(dict.fromkeys(m.label for _, group in found for m in group))
    rows = []
    for quantity, group in found:
        cells = {m.label: m.cell() for m in group}
        vectors = f"{quantity.count} vector{'s' if quantity.count > 1 else ''}"
        set_up = [m for m in group if m.label == f"{OURS}, {FIXED}" and m.every]
        rows.append(
            [
                f"{quantity.matrix}, {vectors}",
                *[cells.get(name, "–") for name in names],
                number(set_up[0].set_up) if set_up else "–",
                fastest_peer(group),
            ]
        )
    report.table(title, ["", *names, "set-up", "fastest peer / hessops"], rows)


def fastest_peer(group: list[Measurement]) -> str:
    """The time of the fastest peer with a right answer, in that of `hessops`."""
    peers = [m for m in group if m.library != OURS and m.times_ours and not m.is_wrong]
    return number(min(m.times_ours for m in peers)) if peers else "–"


def measure(report: Report) -> None:
    """All cases, one after the other."""
    for name in [DIGITS, "transformer, 26k"] if report.effort.quick else RECIPES:
        data = case(name)
        tabulate(report, data, measure_case(report, data))


if __name__ == "__main__":
    described = DESCRIPTION.format(
        full=" and ".join(f"*{name}*" for name in COUNTS),
        accepted=ACCEPTED,
        regularization=REGULARIZATION,
    )
    run("products", "Products", described, measure)
