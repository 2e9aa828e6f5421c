from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from reference import DenseReference, relative_error
from torch import Tensor, nn

from hessops import (
    CgOperator,
    CurvatureOperator,
    DiagonalOperator,
    DirectSolveOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    InverseHarmonicMeanOperator,
    JacobiPreconditioner,
    MinresOperator,
    SolveStatus,
)
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConvergenceWarning,
    IndefiniteOperatorError,
    LossError,
    ModelError,
    NonFiniteError,
    StructureError,
)
from hessops.solvers.refinement import IterativeRefinementOperator

DOUBLE, SINGLE, HALF = torch.float64, torch.float32, torch.bfloat16
PAIRS = [(DOUBLE, SINGLE), (DOUBLE, HALF), (SINGLE, HALF)]
# What products may differ by from exact ones, relatively, and what they differ by at least.
ERRORS = {SINGLE: (1e-9, 1e-5), HALF: (1e-4, 5e-2)}


def network(dtype: torch.dtype = DOUBLE) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def points(dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(11, 3, generator=generator, dtype=DOUBLE).to(dtype)
    return x, torch.randint(2, (11,), generator=generator)


def in_batches(x: Tensor, y: Tensor, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def curvature(
    kind: type[CurvatureOperator] = HessianOperator, dtype: torch.dtype = DOUBLE
) -> CurvatureOperator:
    model = network(dtype).eval()
    return kind(model, nn.CrossEntropyLoss(), in_batches(*points(dtype)))


def normal(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)


# --- products --------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "lower"), PAIRS)
@pytest.mark.parametrize(
    ("kind", "matrix"),
    [
        (HessianOperator, DenseReference.hessian),
        (GaussNewtonOperator, DenseReference.gauss_newton),
        (GeneralizedGaussNewtonOperator, DenseReference.generalized_gauss_newton),
    ],
)
def test_products_are_those_of_the_matrix_up_to_the_lower_precision(
    kind: type[CurvatureOperator],
    matrix: Callable[[DenseReference], Tensor],
    dtype: torch.dtype,
    lower: torch.dtype,
) -> None:
    model = network(dtype).eval().double()
    x, y = points(dtype)
    expected = matrix(DenseReference(model, nn.functional.cross_entropy, x.double(), y))
    operator = curvature(kind, dtype).in_precision(lower)
    rows = normal(3, operator.input_size, dtype=dtype)
    for vectors in (rows, rows[:1], rows[0]):
        product = operator.apply(vectors)
        assert product.dtype == dtype
        assert product.shape == vectors.shape
        least, most = ERRORS[lower]
        assert least < relative_error(product.double(), vectors.double() @ expected) < most


@pytest.mark.parametrize("exponent", [-1000, -100, 100, 1000])
def test_tiny_and_huge_vectors_lose_nothing_but_digits(exponent: int) -> None:
    operator = curvature().in_precision(SINGLE)
    vector = normal(operator.input_size)
    scaled = operator.apply(torch.stack([vector * 2.0**exponent, vector, 0 * vector]))
    assert torch.equal(scaled[0], scaled[1] * 2.0**exponent)
    assert not scaled[2].any()


def test_sums_over_batches_are_in_the_precision_of_the_vectors() -> None:
    # Hessians of 2 and 2 + 2^-6, which bfloat16 holds; it does not hold their mean.
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (target * output.square() / 2).mean()

    one = torch.ones(1, 1, dtype=DOUBLE)
    data = [(one, 2 * one), (one, (2 + 2**-6) * one)]
    operator = HessianOperator(nn.Linear(1, 1, bias=False).double(), loss, data)
    assert operator.in_precision(HALF).apply(one[0]).item() == 2 + 2**-7


def test_everything_that_is_floating_point_is_rounded_and_nothing_else() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.tied = self.linear
            self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
            self.register_buffer("phase", torch.randn(2).to(torch.complex64).exp())
            self.register_buffer("mask", torch.tensor([0.0, 1.0]), persistent=False)
            self.seen: set[torch.dtype] = set()

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            self.seen.update(t.dtype for t in (x["a"], self.mask, self.frozen, self.linear.weight))
            assert x["index"].dtype == torch.int64
            assert self.phase.is_complex()
            return self.tied(x["a"]) * self.frozen + self.mask

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.tensor([1.0, 3.0]))
            self.seen: set[torch.dtype] = set()

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            self.seen.update((output.dtype, target.dtype, self.weight.dtype))
            return ((output - target).square() * self.weight).sum(dim=1)

    model, loss = Model(), Loss()
    x = {"a": normal(5, 3, dtype=SINGLE), "index": torch.arange(5)}
    exact = HessianOperator(model, loss, [(x, torch.zeros(5, 2))], reduction="none")
    lower = exact.in_precision(HALF)
    operation = lower.batch_operation
    operation.rounded.objective.model.seen.clear()
    operation.rounded.objective.loss.seen.clear()
    vector = normal(exact.input_size, dtype=SINGLE)
    assert relative_error(lower.apply(vector), exact.apply(vector)) < 5e-2
    assert operation.rounded.objective.model.seen == {HALF}
    assert operation.rounded.objective.loss.seen == {HALF}
    assert {t.dtype for t in (*model.parameters(), *loss.buffers(), x["a"])} == {SINGLE}
    assert exact.objective is not None
    assert {t.dtype for t in exact.objective.model.parameters()} == {SINGLE}


def test_the_operator_says_what_it_does() -> None:
    operator = curvature().in_precision(HALF).shift(0.5)
    assert "products in torch.bfloat16" in repr(operator)
    assert operator.dtype == DOUBLE
    assert "products in" not in repr(curvature())


def test_a_shift_and_what_has_no_model_stay_exact() -> None:
    hessian = curvature()
    diagonal = DiagonalOperator(normal(hessian.input_size).abs() + 1 / 3)
    vector = normal(hessian.input_size)
    product = (2 * hessian + diagonal).shift(1 / 7).in_precision(HALF).apply(vector)
    of_hessian = hessian.in_precision(HALF).apply(vector)
    expected = 2 * of_hessian + diagonal.diagonal * vector + vector / 7
    assert relative_error(product, expected) < 1e-14
    squared = (hessian @ hessian).in_precision(SINGLE).apply(vector)
    assert 1e-9 < relative_error(squared, hessian.apply(hessian.apply(vector))) < 1e-5


def test_linearized_restricted_and_moved_operators_keep_their_precision() -> None:
    operator = curvature().in_precision(SINGLE)
    vector = normal(operator.input_size)
    product = operator.apply(vector)
    linearized = operator.linearize()
    for _ in range(3):
        assert relative_error(linearized.apply(vector), product) < 1e-6
    of_linearized = curvature().linearize().in_precision(SINGLE)
    assert relative_error(of_linearized.apply(vector), product) < 1e-6
    block = operator.restricted(["3.weight"])
    assert operator.space is not None
    index = operator.space.indices(["3.weight"])
    expected = operator.to_dense()[index][:, index]
    assert relative_error(block.to_dense(), expected) < 1e-6
    assert "products in torch.float32" in repr(block)
    assert operator.to("meta").apply(vector).is_meta


def test_refresh_is_that_of_the_operator_alone() -> None:
    model = network().eval()
    exact = HessianOperator(model, nn.CrossEntropyLoss(), in_batches(*points()))
    lower = exact.in_precision(SINGLE)
    vector = normal(exact.input_size)
    before = lower.apply(vector)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    exact.refresh()
    assert torch.equal(lower.apply(vector), before)
    assert relative_error(exact.apply(vector), before) > 1e-2
    assert relative_error(lower.refresh().apply(vector), exact.apply(vector)) < 1e-5


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "lower"),
    [(DOUBLE, DOUBLE), (DOUBLE, torch.float16), (SINGLE, SINGLE), (SINGLE, DOUBLE), (HALF, HALF)],
)
def test_a_dtype_that_is_not_lower_is_refused(dtype: torch.dtype, lower: torch.dtype) -> None:
    with pytest.raises(ArgumentError, match="lower than that of the vectors"):
        curvature(dtype=dtype).in_precision(lower)


def test_what_is_no_dtype_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match=r"must be a torch\.dtype"):
        curvature().in_precision("float32")  # type: ignore[arg-type]  # that is the point


def test_operators_without_a_product_in_lower_precision_are_refused() -> None:
    with pytest.raises(StructureError):
        DiagonalOperator(torch.ones(2, dtype=DOUBLE)).shift(1.0).in_precision(SINGLE)
    mean = InverseHarmonicMeanOperator(
        network().eval(), nn.CrossEntropyLoss(), in_batches(*points()), 0.1
    )
    with pytest.raises(StructureError, match="it is an inverse"):
        mean.in_precision(SINGLE)


def test_a_model_that_insists_on_its_dtype_is_refused() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2).double()
            self.constant = torch.ones(3, dtype=DOUBLE)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x * self.constant)

    operator = HessianOperator(Stubborn(), nn.CrossEntropyLoss(), in_batches(*points()))
    vector = normal(operator.input_size)
    operator.apply(vector)
    with pytest.raises(ModelError, match=r"in torch\.float32, the model and its loss"):
        operator.in_precision(SINGLE).apply(vector)


def test_values_beyond_the_range_of_the_lower_dtype_are_refused() -> None:
    x, y = torch.ones(3, 1, dtype=DOUBLE), torch.zeros(3, 1, dtype=DOUBLE)
    model = nn.Linear(1, 1, bias=False).double()
    operator = HessianOperator(model, nn.MSELoss(), [(1e60 * x, y)])
    operator.apply(torch.ones(1, dtype=DOUBLE))
    with pytest.raises(NonFiniteError, match="'x'"):
        operator.in_precision(SINGLE).apply(torch.ones(1, dtype=DOUBLE))
    nn.init.constant_(model.weight, 1e60)
    with pytest.raises(NonFiniteError, match=r"in torch\.float32, parameter 'weight'"):
        HessianOperator(model, nn.MSELoss(), [(x, y)]).in_precision(SINGLE)


def test_claims_about_the_loss_are_checked_in_full_precision_too() -> None:
    # Weights that differ by less than bfloat16 can tell.
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.001], dtype=DOUBLE))
    operator = HessianOperator(network().eval(), loss, in_batches(*points()))
    with pytest.raises(LossError):
        operator.in_precision(HALF).apply(normal(operator.input_size))


# --- solves ----------------------------------------------------------------------------------


def regression(
    condition: float, dtype: torch.dtype = DOUBLE, smallest: float | None = None
) -> tuple[HessianOperator, Tensor]:
    """A Hessian with a given condition number, and its matrix in float64 by hand."""
    size, count = 16, 21
    basis, _ = torch.linalg.qr(normal(count, size))
    turn, _ = torch.linalg.qr(normal(size, size))
    values = torch.logspace(0, 1, size, base=1 / condition, dtype=DOUBLE)
    if smallest is not None:
        values[-4:] = smallest
    x = ((basis * values.sqrt()) @ turn * (count / 2) ** 0.5).to(dtype)
    model = nn.Linear(size, 1, bias=False).to(dtype)
    data = [(part, part.new_zeros(len(part), 1)) for part in x.split(14)]
    wide = x.double()
    return HessianOperator(model, nn.MSELoss(), data), 2 / count * wide.T @ wide


def residuals(matrix: Tensor, rhs: Tensor, value: Tensor) -> Tensor:
    scale = rhs.double().abs().amax(dim=-1, keepdim=True)
    scaled, solved = rhs.double() / scale, value.double() / scale
    return (scaled - solved @ matrix).norm(dim=-1) / scaled.norm(dim=-1)


def test_float32_products_solve_a_system_to_the_precision_of_float64() -> None:
    operator, matrix = regression(1e4)
    inverse = IterativeRefinementOperator(operator, partial(CgOperator, rtol=1e-3), rtol=1e-10)
    rhs = normal(4, 16) * torch.tensor([1e-200, 1.0, 1e3, 1e200], dtype=DOUBLE).unsqueeze(1)
    for vectors in (rhs, rhs[2]):
        solution = inverse.solve(vectors)
        assert bool(solution.converged.all())
        true = residuals(matrix, vectors, solution.value)
        assert bool((true <= 1.1e-10).all())
        reported = solution.relative_residual_norms.reshape(true.shape)
        assert torch.allclose(reported, true, rtol=0.1, atol=1e-12)


def test_the_precision_of_float32_alone_would_not_do() -> None:
    operator, matrix = regression(1e4)
    rhs = normal(2, 16)
    value = operator.in_precision(SINGLE).inverse(partial(CgOperator, rtol=1e-12)).solve(rhs).value
    assert bool((residuals(matrix, rhs, value) > 1e-8).all())


@pytest.mark.parametrize(("condition", "reaches"), [(10.0, True), (1e6, False)])
def test_bfloat16_products_solve_in_float32_or_say_that_they_do_not(
    condition: float, reaches: bool
) -> None:
    operator, matrix = regression(condition, SINGLE)
    rhs = normal(3, 16, dtype=SINGLE)
    solution = IterativeRefinementOperator(operator, product_dtype=HALF, rtol=1e-4).solve(rhs)
    true = residuals(matrix, rhs, solution.value)
    assert torch.allclose(solution.relative_residual_norms, true, rtol=0.1, atol=1e-5)
    if reaches:
        assert bool((true <= 1.1e-4).all())
        assert bool(solution.converged.all())
    else:
        assert bool((true > 1e-4).all())
        assert set(solution.status) == {SolveStatus.STAGNATED}
        assert "did not halve" in solution.detail


def test_stagnation_warns() -> None:
    operator, _ = regression(1e6, SINGLE)
    with pytest.warns(ConvergenceWarning, match="wider product_dtype"):
        IterativeRefinementOperator(operator, product_dtype=HALF).apply(normal(16, dtype=SINGLE))


def test_negative_curvature_is_reported() -> None:
    operator, _ = regression(1e2)
    indefinite = operator.shift(-0.3)
    solution = IterativeRefinementOperator(indefinite).solve(normal(2, 16))
    assert set(solution.status) == {SolveStatus.INDEFINITE}
    assert bool((solution.smallest_curvatures < 0).all())
    with pytest.raises(IndefiniteOperatorError, match="most negative curvature"):
        IterativeRefinementOperator(indefinite).apply(normal(16))
    by_minres = IterativeRefinementOperator(indefinite, partial(MinresOperator, rtol=1e-4))
    assert bool(by_minres.solve(normal(2, 16)).converged.all())


def test_curvature_that_rounding_makes_negative_is_not_reported_as_that_of_the_operator() -> None:
    # Positive definite, with eigenvalues far below what bfloat16 can tell from zero.
    operator, _ = regression(10.0, smallest=1e-9)
    solution = IterativeRefinementOperator(operator, product_dtype=HALF).solve(normal(4, 16))
    assert SolveStatus.INDEFINITE not in solution.status
    assert not bool(solution.converged.any())


def test_regularization_is_exact_and_can_be_replaced() -> None:
    operator, matrix = regression(1e4)
    inverse = IterativeRefinementOperator(operator.shift(1 / 3), regularization=1.0, rtol=1e-12)
    rhs = normal(2, 16)
    identity = torch.eye(16, dtype=DOUBLE)
    value = inverse.apply(rhs)
    assert bool((residuals(matrix + 4 / 3 * identity, rhs, value) < 1.1e-12).all())
    value = inverse.with_regularization(1e-3).apply(rhs)
    assert bool((residuals(matrix + (1e-3 + 1 / 3) * identity, rhs, value) < 1.1e-12).all())
    assert inverse.regularization == 1.0


class CountingHessian(HessianOperator):
    applications: dict[str, int]

    def _apply_rows(self, rows: Tensor) -> Tensor:
        key = "lower" if "products in" in repr(self) else "exact"
        self.applications[key] += 1
        return super()._apply_rows(rows)


def test_applications_and_history_are_those_of_the_outer_loop() -> None:
    x = normal(40, 16)
    model = nn.Linear(16, 1, bias=False).double()
    operator = CountingHessian(model, nn.MSELoss(), [(x, normal(40, 1))])
    operator.applications = {"lower": 0, "exact": 0}
    solver = partial(CgOperator, rtol=1e-3, preconditioner=JacobiPreconditioner())
    inverse = IterativeRefinementOperator(operator, solver, rtol=1e-9)
    rhs = normal(3, 16)
    rhs[1] = 0
    solution = inverse.solve(rhs, history=True)
    assert solution.num_applications == operator.applications["exact"]
    assert f"{solution.num_applications} products in torch.float64" in solution.detail
    assert solution.residual_history is not None
    lengths = [len(norms) for norms in solution.residual_history]
    assert lengths == [n + 1 for n in solution.iterations.tolist()]
    assert solution.iterations[1] == 0
    assert not solution.value[1].any()
    assert solution.num_preconditioner_applications > 0


def test_a_first_guess_saves_corrections_and_a_bad_one_does_no_harm() -> None:
    operator, matrix = regression(1e3)
    inverse = IterativeRefinementOperator(operator, rtol=1e-10)
    rhs = normal(2, 16)
    cold = inverse.solve(rhs)
    near = torch.linalg.solve(matrix, rhs.T).T * (1 + 1e-6)
    warm = inverse.solve(rhs, near)
    assert bool((warm.iterations < cold.iterations).all())
    bad = inverse.solve(rhs, 1e9 * normal(2, 16))
    assert torch.equal(bad.iterations, cold.iterations)
    for solution in (cold, warm, bad):
        assert bool((residuals(matrix, rhs, solution.value) <= 1.1e-10).all())


def test_corrections_that_run_out_are_reported() -> None:
    operator, matrix = regression(1e3)
    inverse = IterativeRefinementOperator(operator, rtol=1e-12, maxiter=1)
    rhs = normal(16)
    solution = inverse.solve(rhs)
    assert solution.status == (SolveStatus.MAX_ITERATIONS,)
    assert residuals(matrix, rhs, solution.value) < 1e-2
    with pytest.warns(ConvergenceWarning, match="max iterations"):
        inverse.apply(rhs)


def test_other_inner_solvers_serve() -> None:
    operator, matrix = regression(1e3)
    inverse = IterativeRefinementOperator(operator, DirectSolveOperator, rtol=1e-12)
    rhs = normal(2, 16)
    assert bool((residuals(matrix, rhs, inverse.apply(rhs)) < 1.1e-12).all())
    with pytest.raises(ArgumentTypeError, match="solver must make an InverseOperator"):
        IterativeRefinementOperator(operator, lambda system: system)


def test_refresh_reaches_both_operators() -> None:
    model = network().eval()
    H = GeneralizedGaussNewtonOperator(model, nn.CrossEntropyLoss(), in_batches(*points()))
    inverse = IterativeRefinementOperator(H, regularization=1.0, rtol=1e-8)
    rhs = normal(H.input_size)
    before = inverse.apply(rhs)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert torch.equal(inverse.apply(rhs), before)
    fresh = copy.copy(inverse).refresh().solve(rhs)
    again = GeneralizedGaussNewtonOperator(model, nn.CrossEntropyLoss(), in_batches(*points()))
    expected = IterativeRefinementOperator(again, regularization=1.0, rtol=1e-8).solve(rhs)
    assert torch.equal(fresh.value, expected.value)
    assert relative_error(fresh.value, before) > 1e-3


def test_a_module_with_two_names_is_rounded_after_a_product_too() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3).double()
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

    operator = HessianOperator(Twice(), nn.CrossEntropyLoss(), in_batches(*points()))
    vector = normal(operator.input_size)
    product = operator.apply(vector)
    assert relative_error(operator.in_precision(SINGLE).apply(vector), product) < 1e-5
    assert operator.to("meta").apply(vector).is_meta
