"""Preconditioners: what they approximate, that they are used, and that a new λ costs nothing."""

from __future__ import annotations

import pytest
import torch
from reference import random_spd
from solver_cases import SOLVERS, Counting, normal, true_residuals
from torch import Tensor, nn

import hessops
from hessops import (
    BlockDiagonalPreconditioner,
    CgOperator,
    ClosedFormInverse,
    DiagonalOperator,
    DirectSolveOperator,
    FittedPreconditioner,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    JacobiPreconditioner,
    LowRankProductOperator,
    MatrixOperator,
    MinresOperator,
    NystroemPreconditioner,
    Preconditioner,
    SolveStatus,
    TensorOperator,
)
from hessops.errors import (
    ArgumentError,
    IndefiniteSketchWarning,
    ParameterNameError,
    ReadOnlyError,
    StructureError,
)
from hessops.functional import operator_nystroem_approximation
from hessops.testing import check_operator


def decaying(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A positive semi-definite matrix whose spectrum falls tenfold every three eigenvalues."""
    basis, _ = torch.linalg.qr(normal(size, size, seed=seed))
    values = 10.0 ** (-torch.arange(size, dtype=torch.float64) / 3)
    matrix = (basis * values) @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


class CountedInverse(TensorOperator):
    """An operator that counts how often it is applied."""

    def __init__(self, operator: TensorOperator) -> None:
        super().__init__(
            operator.input_size,
            operator.dtype,
            operator.device,
            symmetric=True,
            positive_semidefinite=True,
        )
        self.operator, self.count = operator, 0

    def _apply_rows(self, rows: Tensor) -> Tensor:
        self.count += 1
        return self.operator._product(rows)


RECIPES = {
    "jacobi": JacobiPreconditioner(),
    "nystroem": NystroemPreconditioner(rank=6),
    "adaptive nystroem": NystroemPreconditioner(rank=20, oversampling=2, adaptive=True),
    "blocks": BlockDiagonalPreconditioner(blocks=7),
    "blocks of sketches": BlockDiagonalPreconditioner(
        blocks=7, recipe=NystroemPreconditioner(rank=3, oversampling=2)
    ),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_is_fitted_keeps_the_contract_of_operators(name: str, dtype: torch.dtype) -> None:
    operator = MatrixOperator(decaying(24, dtype=dtype), positive_semidefinite=True)
    fitted = RECIPES[name].fit(operator.shift(0.02), 0.01)
    report = check_operator(fitted)
    assert {"linearity", "adjointness", "definiteness", "devices"} <= set(report.passed)
    assert fitted.positive_semidefinite


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("solver", [CgOperator, MinresOperator])
def test_a_new_regularization_equals_a_new_fit_without_products(name: str, solver) -> None:
    operator = Counting(decaying(24))
    inverse = solver(operator, 0.1, preconditioner=RECIPES[name])
    inverse.solve(normal(24))
    before = operator.count
    changed = inverse.with_regularization(0.2)
    assert operator.count == before
    anew = solver(operator, 0.2, preconditioner=RECIPES[name])
    rhs = normal(3, 24)
    assert torch.allclose(
        changed.fitted_preconditioner().apply(rhs),
        anew.fitted_preconditioner().apply(rhs),
        rtol=1e-9,
        atol=1e-12,
    )
    assert bool(changed.solve(rhs).converged.all())


def test_a_shift_of_the_operator_is_not_sketched_but_added() -> None:
    matrix = decaying(30)
    recipe = NystroemPreconditioner(rank=8)
    shifted = recipe.fit(MatrixOperator(matrix).shift(0.3), 0.2)
    whole = recipe.fit(MatrixOperator(matrix), 0.5)
    rhs = normal(2, 30)
    assert torch.allclose(shifted.apply(rhs), whole.apply(rhs), rtol=1e-12)
    combined = recipe.fit(
        2 * MatrixOperator(matrix / 2).shift(0.1) + DiagonalOperator(torch.zeros(30).double()), 0.3
    )
    assert torch.allclose(combined.apply(rhs), whole.apply(rhs), rtol=1e-6)


# --- Nyström -----------------------------------------------------------------------------


def test_the_nystroem_preconditioner_is_its_formula() -> None:
    matrix, mu = decaying(20), 1e-3
    fitted = NystroemPreconditioner(rank=5, oversampling=3).fit(MatrixOperator(matrix), mu)
    sketch = operator_nystroem_approximation(MatrixOperator(matrix), rank=8)
    values, basis = sketch.eigen_vals[:5], sketch.projections[:, :5]
    outside = torch.eye(20).double() - basis @ basis.T
    expected = (values[-1] + mu) * (basis / (values + mu)) @ basis.T + outside
    assert torch.allclose(fitted.to_dense(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("use_block_cg", [False, True])
def test_a_sketch_of_a_ggn_with_fast_decay_cuts_iterations_fivefold(use_block_cg: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    # Inputs of quickly falling variance make a spectrum that falls quickly.
    x = torch.randn(200, 10).double() * 10.0 ** -torch.arange(10).double().mul(0.4)
    ggn = GeneralizedGaussNewtonOperator(model, nn.MSELoss(), [(x, torch.randn(200, 3).double())])
    rhs = normal(1 if use_block_cg else 4, ggn.input_size)
    plain = CgOperator(ggn, 1e-6, use_block_cg=use_block_cg, maxiter=5000).solve(rhs)
    sketched = CgOperator(
        ggn, 1e-6, use_block_cg=use_block_cg, preconditioner=NystroemPreconditioner(rank=60)
    ).solve(rhs)
    assert bool(plain.converged.all())
    assert bool(sketched.converged.all())
    assert 5 * int(sketched.iterations.max()) <= int(plain.iterations.max())
    dense = ggn.to_dense() + 1e-6 * torch.eye(ggn.input_size).double()
    for solution in (plain, sketched):
        assert float(true_residuals(dense, rhs, solution.value).max()) <= 1.01e-7


@pytest.mark.parametrize("solver", ["cg", "block cg", "minres"])
def test_the_report_counts_the_applications_of_the_preconditioner(solver: str) -> None:
    matrix, rhs = decaying(30), normal(4, 30)
    operator = Counting(matrix)
    counted = CountedInverse(NystroemPreconditioner(rank=8).fit(MatrixOperator(matrix), 1e-3))
    inverse = (
        MinresOperator(operator, 1e-3, preconditioner=counted)
        if solver == "minres"
        else CgOperator(operator, 1e-3, preconditioner=counted, use_block_cg=solver == "block cg")
    )
    for _ in range(2):
        counted.count = operator.count = 0
        solution = inverse.solve(rhs)
        assert bool(solution.converged.all())
        assert counted.count == solution.num_preconditioner_applications > 0
        assert operator.count == solution.num_applications


def test_a_recipe_is_fitted_once_by_one_application_and_then_used() -> None:
    operator = Counting(decaying(30))
    inverse = CgOperator(operator, 1e-3, preconditioner=NystroemPreconditioner(rank=8))
    assert operator.count == 0
    first = inverse.solve(normal(30))
    assert operator.count == first.num_applications + 1
    second = inverse.solve(normal(30))
    assert operator.count == first.num_applications + second.num_applications + 1
    assert torch.equal(first.value, second.value)


def test_an_adaptive_sketch_grows_until_it_reaches_the_regularization() -> None:
    operator = Counting(decaying(60))
    recipe = NystroemPreconditioner(rank=50, adaptive=True)
    large, small = recipe.fit(operator, 1e-1), recipe.fit(operator, 1e-5)
    assert large.sketch.rank < small.sketch.rank <= 40
    assert small.smallest <= 1e-4
    refitted = recipe.refit(large, operator, 1e-5)
    assert refitted.sketch.rank == small.sketch.rank
    with pytest.raises(ArgumentError, match="adaptive"):
        recipe.fit(operator)


def test_a_sketch_of_a_raw_hessian_warns_and_preconditions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = [(torch.randn(40, 4).double(), torch.randint(3, (40,)))]
    hessian = HessianOperator(model, nn.CrossEntropyLoss(), data)
    dense = hessian.to_dense()
    shift = 1e-2 - float(torch.linalg.eigvalsh(dense)[0])
    inverse = CgOperator(hessian, shift, preconditioner=NystroemPreconditioner(rank=20))
    rhs = normal(3, hessian.input_size)
    with pytest.warns(IndefiniteSketchWarning, match="positive part"):
        solution = inverse.solve(rhs)
    assert bool(solution.converged.all())
    damped = dense + shift * torch.eye(len(dense)).double()
    assert float(true_residuals(damped, rhs, solution.value).max()) <= 1.01e-7
    plain = CgOperator(hessian, shift).solve(rhs)
    assert int(solution.iterations.max()) < int(plain.iterations.max())


def test_a_sketch_of_zero_is_the_identity() -> None:
    fitted = NystroemPreconditioner(rank=2).fit(MatrixOperator(torch.zeros(4, 4)), 1.0)
    assert torch.allclose(fitted.to_dense(), torch.eye(4))


def test_a_sketch_of_a_non_symmetric_operator_is_refused() -> None:
    matrix = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    with pytest.raises(StructureError, match="not symmetric"):
        NystroemPreconditioner(rank=1).fit(MatrixOperator(matrix), 1.0)


def test_the_sketch_is_repeatable_and_leaves_the_random_state() -> None:
    operator, rhs = MatrixOperator(decaying(20)), normal(20)
    state = torch.get_rng_state()
    first = NystroemPreconditioner(rank=3).fit(operator, 0.1).apply(rhs)
    second = NystroemPreconditioner(rank=3).fit(operator, 0.1).apply(rhs)
    third = JacobiPreconditioner().fit(operator, 0.1).apply(rhs)
    fourth = JacobiPreconditioner().fit(operator, 0.1).apply(rhs)
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    assert torch.equal(torch.get_rng_state(), state)
    other = NystroemPreconditioner(rank=3, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(other.fit(operator, 0.1).apply(rhs), first)


# --- Jacobi ------------------------------------------------------------------------------


def test_the_diagonal_is_estimated_by_rademacher_probes_in_one_application() -> None:
    matrix = random_spd(40, 10.0) + torch.diag(torch.linspace(1, 50, 40, dtype=torch.float64))
    operator = Counting(matrix)
    fitted = JacobiPreconditioner(num_samples_estimator=30).fit(operator)
    assert operator.count == 1
    estimate = 1 / fitted.apply(torch.ones(40).double())
    assert torch.allclose(estimate, matrix.diagonal(), rtol=0.05)


def test_a_diagonal_matrix_is_found_exactly_by_one_probe() -> None:
    diagonal = torch.logspace(-3, 3, 12, dtype=torch.float64)
    recipe = JacobiPreconditioner(num_samples_estimator=1)
    solution = CgOperator(DiagonalOperator(diagonal), preconditioner=recipe).solve(normal(3, 12))
    assert bool(solution.converged.all())
    assert int(solution.iterations.max()) == 1


def test_jacobi_helps_where_the_diagonal_varies() -> None:
    matrix = random_spd(60, 10.0)
    scales = torch.logspace(-3, 3, 60, dtype=torch.float64)
    matrix = scales.unsqueeze(1) * matrix * scales
    rhs = normal(2, 60)
    plain = CgOperator(MatrixOperator(matrix), maxiter=20000).solve(rhs)
    recipe = JacobiPreconditioner(num_samples_estimator=60)
    jacobi = CgOperator(MatrixOperator(matrix), preconditioner=recipe).solve(rhs)
    assert bool(jacobi.converged.all())
    assert 10 * int(jacobi.iterations.max()) < int(plain.iterations.max())


def test_jacobi_stays_positive_for_an_indefinite_operator() -> None:
    matrix = torch.diag(torch.tensor([3.0, -2.0, 0.0, 1e-30])).double() + 0.1
    for count in (1, 2, 3, 10):
        fitted = JacobiPreconditioner(count).fit(MatrixOperator(matrix))
        assert bool((fitted.to_dense().diagonal() > 0).all())
        assert bool(fitted.to_dense().isfinite().all())
    zero = JacobiPreconditioner(2).fit(MatrixOperator(torch.zeros(3, 3)))
    assert torch.equal(zero.to_dense(), torch.eye(3))


# --- blocks ------------------------------------------------------------------------------


def test_blocks_are_the_inverses_of_the_diagonal_blocks() -> None:
    matrix = random_spd(10, 100.0)
    fitted = BlockDiagonalPreconditioner(blocks=4).fit(MatrixOperator(matrix), 0.1)
    damped = matrix + 0.1 * torch.eye(10).double()
    expected = torch.zeros(10, 10).double()
    for start, stop in ((0, 4), (4, 8), (8, 10)):
        expected[start:stop, start:stop] = torch.linalg.inv(damped[start:stop, start:stop])
    assert torch.allclose(fitted.to_dense(), expected, rtol=1e-10, atol=1e-12)


def test_named_blocks_may_be_given_in_any_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(30, 3).double(), torch.randn(30, 2).double())]
    ggn = GeneralizedGaussNewtonOperator(model, nn.MSELoss(), data)
    dense = ggn.to_dense() + 0.01 * torch.eye(ggn.input_size).double()
    # The parts of the second layer are not neighbours of the first bias in this order.
    blocks = {"odd": ["2.bias", "0.weight"], "even": ["2.weight", "0.bias"]}
    fitted = BlockDiagonalPreconditioner(blocks).fit(ggn, 0.01)
    expected = torch.zeros_like(dense)
    for names in blocks.values():
        where = ggn.space.indices(names)
        expected[where.unsqueeze(1), where] = torch.linalg.inv(dense[where.unsqueeze(1), where])
    assert torch.allclose(fitted.to_dense(), expected, rtol=1e-8, atol=1e-10)
    inverse = CgOperator(ggn, 0.01, preconditioner=BlockDiagonalPreconditioner())
    assert bool(inverse.solve(normal(3, ggn.input_size)).converged.all())
    assert inverse.apply_to_dict(ggn.space.unflatten(normal(ggn.input_size))).keys() == set(
        ggn.space.names
    )


def test_blocks_that_do_not_fit_are_refused() -> None:
    operator = MatrixOperator(random_spd(6, 10.0))
    with pytest.raises(StructureError, match="integer"):
        BlockDiagonalPreconditioner().fit(operator)
    model = nn.Linear(2, 2).double()
    data = [(torch.ones(3, 2).double(), torch.ones(3, 2).double())]
    ggn = GeneralizedGaussNewtonOperator(model, nn.MSELoss(), data)
    with pytest.raises(ParameterNameError, match="belong to no block"):
        BlockDiagonalPreconditioner({"first": ["weight"]}).fit(ggn)
    with pytest.raises(TypeError, match="blocks"):
        BlockDiagonalPreconditioner(blocks="layers")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="recipe"):
        BlockDiagonalPreconditioner(2, recipe=JacobiPreconditioner)  # type: ignore[arg-type]


def test_dense_blocks_of_an_indefinite_operator_stay_positive_definite() -> None:
    matrix = torch.diag(torch.tensor([2.0, -1.0, 3.0, -4.0])).double()
    matrix[0, 1] = matrix[1, 0] = 0.5
    fitted = BlockDiagonalPreconditioner(2).fit(MatrixOperator(matrix))
    assert torch.linalg.eigvalsh(fitted.to_dense())[0] > 0.1
    inverse = MinresOperator(MatrixOperator(matrix), preconditioner=BlockDiagonalPreconditioner(2))
    solution = inverse.solve(normal(3, 4))
    assert bool(solution.converged.all())
    assert int(solution.iterations.max()) <= 2  # |A|⁻¹A has the eigenvalues 1 and -1


# --- operators and recipes of one's own --------------------------------------------------


def test_any_operator_preconditions_as_it_is() -> None:
    matrix, rhs = random_spd(40, 1e6), normal(3, 40)
    plain = CgOperator(MatrixOperator(matrix)).solve(rhs)
    near = DirectSolveOperator(matrix, 1e-5)
    solution = CgOperator(MatrixOperator(matrix), preconditioner=near).solve(rhs)
    assert bool(solution.converged.all())
    assert 3 * int(solution.iterations.max()) < int(plain.iterations.max())


def test_an_iterative_inverse_preconditions() -> None:
    matrix, rhs = random_spd(40, 1e5), normal(3, 40)
    inner = CgOperator(MatrixOperator(matrix), 1e-4, rtol=1e-2)
    outer = CgOperator(MatrixOperator(matrix), preconditioner=inner).solve(rhs)
    assert bool(outer.converged.all())
    assert float(true_residuals(matrix, rhs, outer.value).max()) <= 1.01e-7
    plain = CgOperator(MatrixOperator(matrix)).solve(rhs)
    assert 3 * int(outer.iterations.max()) < int(plain.iterations.max())


def test_a_damped_low_rank_inverse_of_the_ggn_preconditions_the_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = [(torch.randn(40, 4).double(), torch.randint(3, (40,)))]
    loss = nn.CrossEntropyLoss()
    hessian = HessianOperator(model, loss, data)
    ggn = GeneralizedGaussNewtonOperator(model, loss, data)
    shift = 1e-2 - float(torch.linalg.eigvalsh(hessian.to_dense())[0])
    sketch = LowRankProductOperator(operator_nystroem_approximation(ggn, rank=30))
    near = sketch.shift(shift).inverse()
    rhs = normal(3, hessian.input_size)
    solution = CgOperator(hessian, shift, preconditioner=near).solve(rhs)
    plain = CgOperator(hessian, shift).solve(rhs)
    assert bool(solution.converged.all())
    assert int(solution.iterations.max()) < int(plain.iterations.max())


def test_a_recipe_of_ones_own_is_fitted_to_operator_and_regularization() -> None:
    seen = []

    class Mine(Preconditioner):
        def fit(self, operator, regularization=None):
            seen.append((operator, regularization))
            return DiagonalOperator(1 / (operator.to_dense().diagonal() + regularization))

    operator = MatrixOperator(random_spd(10, 100.0))
    inverse = CgOperator(operator, 0.1, preconditioner=Mine())
    assert bool(inverse.solve(normal(10)).converged)
    changed = inverse.with_regularization(0.3)
    assert bool(changed.solve(normal(10)).converged)
    assert seen == [(operator, 0.1), (operator, 0.3)]


def test_refreshing_fits_anew() -> None:
    model = nn.Linear(3, 2).double()
    data = [(normal(20, 3), normal(20, 2, seed=4))]
    ggn = GeneralizedGaussNewtonOperator(model, nn.MSELoss(), data)
    inverse = CgOperator(ggn, 0.1, preconditioner=JacobiPreconditioner())
    before = inverse.fitted_preconditioner()
    assert inverse.fitted_preconditioner() is before
    assert inverse.refresh().fitted_preconditioner() is not before


def test_moving_a_solver_moves_what_was_fitted() -> None:
    for name, recipe in RECIPES.items():
        inverse = CgOperator(MatrixOperator(decaying(24)), 0.1, preconditioner=recipe)
        inverse.solve(normal(24))
        moved = inverse.to("meta")
        fitted = moved.fitted_preconditioner()
        assert fitted.device.type == "meta", name
        assert fitted._product(torch.zeros(2, 24, device="meta").double()).shape == (2, 24)


@pytest.mark.parametrize(
    ("preconditioner", "error", "text"),
    [
        (JacobiPreconditioner, TypeError, "preconditioner must be"),
        (MatrixOperator(torch.eye(4).double()), ValueError, "sizes 3 and 4"),
        (MatrixOperator(torch.eye(3)), TypeError, "float32"),
        (DiagonalOperator(torch.tensor([1.0, -1.0, 1.0]).double()), ValueError, "definite"),
        (MatrixOperator(torch.ones(3, 3).double().triu()), ValueError, "not symmetric"),
    ],
    ids=["class", "size", "dtype", "indefinite", "asymmetric"],
)
def test_unsuitable_preconditioners_are_refused(preconditioner, error, text: str) -> None:
    with pytest.raises(error, match=text):
        CgOperator(MatrixOperator(random_spd(3, 10.0)), preconditioner=preconditioner)


def test_a_preconditioner_that_does_not_know_that_it_is_indefinite_is_found_out() -> None:
    bad = DiagonalOperator(torch.tensor([1.0, 1.0, -1.0]).double())
    bad._positive_semidefinite = None
    rhs = torch.tensor([[0.1, 0.1, 5.0]]).double()
    solution = CgOperator(MatrixOperator(random_spd(3, 10.0)), preconditioner=bad).solve(rhs)
    assert solution.status == (SolveStatus.PRECONDITIONER,)
    assert "positive definite" in solution.advice[0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: JacobiPreconditioner(0), "num_samples_estimator"),
        (lambda: NystroemPreconditioner(rank=0), "rank"),
        (lambda: NystroemPreconditioner(rank=2, oversampling=-1), "oversampling"),
        (lambda: BlockDiagonalPreconditioner(0), "blocks"),
    ],
)
def test_bad_arguments_are_named(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_the_spellings_of_pydvl_are_the_same_classes() -> None:
    assert hessops.NystroemPreConditioner is NystroemPreconditioner
    assert hessops.JacobiPreConditioner is JacobiPreconditioner


def test_the_tree_of_a_solver_names_its_preconditioner() -> None:
    operator = MatrixOperator(random_spd(3, 10.0))
    assert "JacobiPreconditioner(num_samples_estimator=10" in repr(
        CgOperator(operator, preconditioner=JacobiPreconditioner())
    )
    fitted = JacobiPreconditioner().fit(operator, 0.5)
    assert isinstance(fitted, FittedPreconditioner)
    assert "preconditioner=Jacobi(regularization=0.5)" in repr(
        CgOperator(operator, preconditioner=fitted)
    )


def test_blocks_within_blocks_are_refitted_as_their_own_recipe_does() -> None:
    operator = MatrixOperator(decaying(40))
    sketch = NystroemPreconditioner(rank=20, oversampling=5, adaptive=True)
    for recipe in (
        BlockDiagonalPreconditioner(20, recipe=sketch),
        BlockDiagonalPreconditioner(20, recipe=BlockDiagonalPreconditioner(20, recipe=sketch)),
    ):
        inverse = CgOperator(operator, 1.0, preconditioner=recipe)
        inverse.solve(normal(40))
        changed = inverse.with_regularization(1e-7).fitted_preconditioner()
        anew = recipe.fit(operator, 1e-7)
        rhs = normal(2, 40)
        assert torch.allclose(changed.apply(rhs), anew.apply(rhs), rtol=1e-6)


def test_sampled_and_exact_jacobi_agree_on_a_diagonal_of_either_sign() -> None:
    diagonal = torch.tensor([-1.0, 2.0, -3.0, 4.0, 5.0]).double()
    sampled = JacobiPreconditioner(3).fit(DiagonalOperator(diagonal))
    exact = JacobiPreconditioner(5).fit(DiagonalOperator(diagonal))
    assert torch.allclose(sampled.to_dense(), torch.diag(1 / diagonal.abs()))
    assert torch.allclose(exact.to_dense(), sampled.to_dense())


@pytest.mark.parametrize("solver", [CgOperator, MinresOperator])
def test_a_singular_preconditioner_leaves_no_nan(solver) -> None:
    singular = DiagonalOperator(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    rhs = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    inverse = solver(MatrixOperator(random_spd(4, 10.0).float()), preconditioner=singular)
    solution = inverse.solve(rhs)
    assert not bool(solution.converged.any())
    assert bool(solution.value.isfinite().all())
    assert not bool(solution.smallest_curvatures.isnan().any())


@pytest.mark.parametrize("solver", ["cg", "block cg", "minres"])
def test_a_direct_inverse_preconditions_without_measuring_itself(solver: str) -> None:
    matrix, rhs = random_spd(20, 1e4), normal(3, 20)
    near = matrix + 1e-3 * torch.eye(20).double()
    measured = Counting(near)
    given = ClosedFormInverse(measured, MatrixOperator(torch.linalg.inv(near)))
    inverse = SOLVERS[solver](matrix, given)
    assert bool(inverse.solve(rhs).converged.all())
    assert measured.count == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_regularization_is_not_assigned_but_replaced(solver: str) -> None:
    inverse = SOLVERS[solver](random_spd(12, 10.0), None)
    kept = inverse.regularization
    with pytest.raises(ReadOnlyError, match=r"regularization.*0\.7.*with_regularization"):
        inverse.regularization = 0.7
    assert inverse.regularization == kept
    assert inverse.with_regularization(0.7).regularization == 0.7
