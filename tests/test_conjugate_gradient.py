"""Conjugate gradients by true residuals: every right-hand side is solved or said not to be."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from reference import random_spd
from solver_cases import Counting, Overflowing, normal
from torch import Tensor, nn

from hessops import (
    CgOperator,
    DiagonalOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    MatrixOperator,
    Solution,
    SolveStatus,
)
from hessops.errors import (
    ConvergenceWarning,
    IndefiniteOperatorError,
    NonFiniteError,
    NonFiniteProductError,
    SolverBreakdownError,
    StructureError,
)


def true_residuals(matrix: Tensor, rhs: Tensor, value: Tensor) -> Tensor:
    return (rhs - value @ matrix.T).norm(dim=-1)


def test_twenty_right_hand_sides_on_eight_parameters_are_all_solved() -> None:
    matrix, rhs = random_spd(8, 1e4), normal(20, 8)
    solution = CgOperator(MatrixOperator(matrix)).solve(rhs)
    assert solution.value.shape == (20, 8)
    assert solution.converged.tolist() == [True] * 20
    assert bool((true_residuals(matrix, rhs, solution.value) <= 1e-7 * rhs.norm(dim=1)).all())


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e8])
@pytest.mark.parametrize("lead", [(), (1,), (3,), (33,)], ids=str)
def test_the_true_residual_meets_the_tolerance(lead: tuple[int, ...], condition: float) -> None:
    matrix, rhs = random_spd(30, condition), normal(*lead, 30)
    operator = CgOperator(MatrixOperator(matrix), maxiter=2000)
    solution = operator.solve(rhs)
    assert solution.value.shape == rhs.shape
    assert bool(solution.converged.all())
    residuals = true_residuals(matrix, rhs, solution.value).reshape(-1)
    assert bool((residuals <= 1.01e-7 * rhs.norm(dim=-1).reshape(-1)).all())
    assert torch.allclose(solution.residual_norms, residuals, rtol=1e-2, atol=1e-15)
    # A multiple of the right-hand side is no solution.
    assert (solution.value / rhs).std() > 0.1


def test_a_vector_is_answered_with_a_vector_and_one_status() -> None:
    solution = CgOperator(MatrixOperator(random_spd(5, 10))).solve(normal(5))
    assert solution.value.shape == (5,)
    assert solution.status == (SolveStatus.CONVERGED,)
    assert solution.iterations.shape == solution.residual_norms.shape == (1,)


def test_scaling_one_right_hand_side_leaves_the_others_bitwise_equal() -> None:
    matrix, rhs = random_spd(30, 1e5), normal(6, 30)
    operator = CgOperator(MatrixOperator(matrix))
    scaled = rhs.clone()
    scaled[2] *= 1e6
    first, second = operator.solve(rhs), operator.solve(scaled)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(first.value[others], second.value[others])
    assert torch.equal(first.residual_norms[others], second.residual_norms[others])
    assert second.relative_residual_norms[2] <= 1e-7


def test_scaling_one_right_hand_side_of_a_network_leaves_the_others_bitwise_equal() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    data = [(torch.randn(20, 4), torch.randint(3, (20,))) for _ in range(2)]
    operator = GeneralizedGaussNewtonOperator(model, nn.CrossEntropyLoss(), data)
    rhs = normal(5, operator.input_size, dtype=torch.float32)
    scaled = rhs.clone()
    scaled[4] *= 1e6
    inverse = CgOperator(operator, 1e-2)
    first, second = inverse.solve(rhs), inverse.solve(scaled)
    assert torch.equal(first.value[:4], second.value[:4])


@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_scale_of_the_right_hand_side_does_not_matter(
    dtype: torch.dtype, factor: float
) -> None:
    matrix = random_spd(10, 100, dtype=dtype)
    operator = CgOperator(MatrixOperator(matrix))
    rhs = normal(10, dtype=dtype)
    solution = operator.solve(factor * rhs)
    assert bool(solution.converged.all())
    unscaled = solution.value / factor
    assert (rhs - matrix @ unscaled).norm() <= 2 * operator.rtol * rhs.norm()


def test_zero_right_hand_sides_are_solved_by_zero_without_a_step() -> None:
    rhs = normal(3, 6)
    rhs[1] = 0
    solution = CgOperator(MatrixOperator(random_spd(6, 10))).solve(rhs)
    assert bool(solution.converged.all())
    assert solution.value[1].count_nonzero() == 0
    assert solution.iterations[1] == 0


def test_no_right_hand_side_has_no_solution() -> None:
    solution = CgOperator(MatrixOperator(random_spd(6, 10))).solve(torch.zeros(0, 6).double())
    assert solution.value.shape == (0, 6)
    assert solution.status == ()


def test_right_hand_sides_share_their_applications() -> None:
    operator = Counting(random_spd(20, 100))
    alone = CgOperator(operator).solve(normal(20))
    operator.count = 0
    together = CgOperator(operator).solve(normal(15, 20))
    assert together.num_applications == operator.count
    # A measurement of the true residual in each hundredfold reduction, and at the end.
    assert operator.count <= int(together.iterations.max()) + 6
    assert int(alone.iterations) <= int(together.iterations.max()) + 3


def test_the_iteration_budget_does_not_grow_with_the_right_hand_sides() -> None:
    operator = Counting(random_spd(20, 1e8))
    inverse = CgOperator(operator, maxiter=7, warn_on_max_iteration=False)
    inverse.solve(normal(50, 20))
    assert operator.count == 8  # and one to verify


def test_running_out_of_iterations_warns_and_logs(caplog) -> None:
    operator = CgOperator(MatrixOperator(random_spd(20, 1e6)), maxiter=3)
    stops_short = pytest.warns(ConvergenceWarning, match=r"max iterations.*raise maxiter")
    with caplog.at_level(logging.WARNING, logger="hessops"), stops_short:
        value = operator.apply(normal(20))
    assert "max iterations" in caplog.text
    assert bool(value.isfinite().all())
    assert value.count_nonzero() > 0
    assert operator.solve(normal(20)).status == (SolveStatus.MAX_ITERATIONS,)


def test_running_out_of_iterations_can_be_silent(caplog) -> None:
    matrix = MatrixOperator(random_spd(20, 1e6))
    operator = CgOperator(matrix, maxiter=3, warn_on_max_iteration=False)
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG, logger="hessops"):
        warnings.simplefilter("error")
        operator.apply(normal(20))
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_solve_reports_and_does_not_warn() -> None:
    operator = CgOperator(MatrixOperator(random_spd(20, 1e6)), maxiter=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not operator.solve(normal(20)).converged


def test_a_clearly_indefinite_operator_raises() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, -0.5])).double()
    operator = CgOperator(MatrixOperator(matrix))
    with pytest.raises(IndefiniteOperatorError, match="negative curvature"):
        operator.apply(normal(4))
    solution = operator.solve(normal(2, 4))
    assert SolveStatus.INDEFINITE in solution.status
    assert bool(solution.value.isfinite().all())
    assert solution.smallest_curvatures.min() < 0


def test_regularization_above_the_most_negative_eigenvalue_makes_it_solvable() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, -0.5])).double()
    solution = CgOperator(MatrixOperator(matrix), regularization=0.6).solve(normal(4))
    assert bool(solution.converged.all())


def test_a_negative_definite_operator_raises() -> None:
    with pytest.raises(IndefiniteOperatorError):
        CgOperator(MatrixOperator(-random_spd(5, 10))).apply(normal(5))


def test_rounding_of_a_semi_definite_operator_is_not_called_indefinite() -> None:
    factor = normal(4, 30)
    matrix = factor.T @ factor / 30
    inside = normal(5, 4) @ factor
    solution = CgOperator(MatrixOperator(matrix)).solve(inside)
    assert bool(solution.converged.all())


def test_a_singular_operator_and_a_right_hand_side_outside_its_range_break_down() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0])).double()
    operator = CgOperator(MatrixOperator(matrix))
    with pytest.raises(SolverBreakdownError, match="singular"):
        operator.apply(torch.ones(3, dtype=torch.float64))
    assert operator.solve(torch.ones(3).double()).status == (SolveStatus.BREAKDOWN,)
    assert bool(operator.solve(torch.tensor([1.0, 1.0, 0.0]).double()).converged)


def test_the_zero_operator_breaks_down() -> None:
    operator = CgOperator(MatrixOperator(torch.zeros(3, 3).double()))
    assert operator.solve(torch.ones(3).double()).status == (SolveStatus.BREAKDOWN,)


def test_non_finite_products_raise() -> None:
    operator = CgOperator(Overflowing())
    with pytest.raises(NonFiniteProductError, match="non-finite"):
        operator.apply(torch.ones(3, dtype=torch.float64))
    solution = operator.solve(torch.ones(3, dtype=torch.float64))
    assert solution.status == (SolveStatus.NON_FINITE,)
    assert bool(solution.value.isfinite().all())


def test_a_nan_right_hand_side_is_refused() -> None:
    rhs = torch.ones(2, 3, dtype=torch.float64)
    rhs[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="rhs"):
        CgOperator(MatrixOperator(random_spd(3, 10))).solve(rhs)


def test_one_bad_right_hand_side_does_not_touch_the_others() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, -0.5])).double()
    rhs = torch.eye(4, dtype=torch.float64)
    solution = CgOperator(MatrixOperator(matrix)).solve(rhs)
    assert solution.converged.tolist() == [True, True, True, False]
    assert torch.allclose(solution.value[:3], torch.linalg.inv(matrix)[:3])


def test_float32_converges_at_its_default_tolerance() -> None:
    matrix = random_spd(40, 50, dtype=torch.float32)
    rhs = normal(5, 40, dtype=torch.float32)
    operator = CgOperator(MatrixOperator(matrix))
    assert operator.rtol == 1e-4
    solution = operator.solve(rhs)
    assert bool(solution.converged.all())
    exact = true_residuals(matrix.double(), rhs.double(), solution.value.double())
    assert bool((exact <= 1.1e-4 * rhs.norm(dim=1)).all())


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-9), (torch.float64, 1e-18)], ids=str
)
def test_stagnation_at_the_precision_of_the_dtype_is_said(dtype: torch.dtype, rtol: float) -> None:
    matrix = random_spd(30, 1e3, dtype=dtype)
    operator = CgOperator(MatrixOperator(matrix), rtol=rtol)
    solution = operator.solve(normal(3, 30, dtype=dtype))
    assert set(solution.status) == {SolveStatus.STAGNATED}
    assert solution.status[0] == "stagnated"
    assert float(solution.relative_residual_norms.max()) < 1e3 * torch.finfo(dtype).eps
    with pytest.warns(ConvergenceWarning, match="stagnated.*precision"):
        operator.apply(normal(30, dtype=dtype))


def test_atol_is_zero_by_default_and_counts_when_given() -> None:
    matrix = MatrixOperator(random_spd(10, 100))
    small = 1e-9 * normal(10)
    assert CgOperator(matrix).solve(small).value.count_nonzero() == 10
    loose = CgOperator(matrix, atol=1e-6).solve(small)
    assert loose.value.count_nonzero() == 0
    assert loose.converged.tolist() == [True]


def test_defaults() -> None:
    operator = CgOperator(MatrixOperator(random_spd(7, 10)))
    assert (operator.rtol, operator.atol, operator.maxiter) == (1e-7, 0.0, 70)
    assert operator.regularization == 0.0


def test_regularization_adds_to_a_shift_and_is_replaced_alone() -> None:
    matrix, rhs = random_spd(8, 100), normal(8)
    eye = torch.eye(8, dtype=torch.float64)
    inverse = CgOperator(MatrixOperator(matrix).shift(0.1), regularization=0.2, rtol=1e-12)
    changed = inverse.with_regularization(0.5)
    for operator, shift in ((inverse, 0.3), (changed, 0.6)):
        expected = torch.linalg.solve(matrix + shift * eye, rhs)
        assert torch.allclose(operator.apply(rhs), expected, rtol=1e-9)
    assert inverse.regularization == 0.2


def test_two_solves_are_bitwise_equal() -> None:
    operator = CgOperator(MatrixOperator(random_spd(20, 1e4)))
    rhs = normal(3, 20)
    assert torch.equal(operator.apply(rhs), operator.apply(rhs))


def test_the_inverse_of_the_inverse_is_the_damped_operator() -> None:
    matrix = random_spd(6, 10)
    system = CgOperator(MatrixOperator(matrix), regularization=0.5).inverse()
    assert torch.allclose(system.to_dense(), matrix + 0.5 * torch.eye(6).double())


def test_a_damped_network_hessian_is_solved() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = [(torch.randn(20, 4).double(), torch.randint(3, (20,)))]
    hessian = HessianOperator(model, nn.CrossEntropyLoss(), data)
    dense = hessian.to_dense()
    shift = 1e-3 - float(torch.linalg.eigvalsh(dense)[0].clamp(max=0))
    rhs = normal(3, hessian.input_size)
    solution = CgOperator(hessian, regularization=shift, maxiter=2000).solve(rhs)
    assert bool(solution.converged.all())
    damped = dense + shift * torch.eye(len(dense)).double()
    assert bool((true_residuals(damped, rhs, solution.value) <= 1.1e-7 * rhs.norm(dim=1)).all())


def test_progress_is_shown_on_request_only(capsys) -> None:
    matrix = MatrixOperator(random_spd(10, 100))
    CgOperator(matrix).solve(normal(10))
    assert capsys.readouterr().err == ""
    CgOperator(matrix, progress=True).solve(normal(10))
    assert "conjugate gradients" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"regularization": -1.0}, ValueError, "regularization"),
        ({"regularization": float("nan")}, ValueError, "regularization"),
        ({"regularization": "1"}, TypeError, "regularization"),
        ({"rtol": -1e-3}, ValueError, "rtol"),
        ({"atol": -1e-3}, ValueError, "atol"),
        ({"maxiter": 0}, ValueError, "maxiter"),
        ({"maxiter": 2.5}, TypeError, "maxiter"),
        ({"preconditioner": object()}, TypeError, "preconditioner"),
    ],
)
def test_bad_arguments_are_named(keywords, error, text) -> None:
    with pytest.raises(error, match=text):
        CgOperator(MatrixOperator(random_spd(3, 10)), **keywords)


def test_operators_that_cg_cannot_solve_are_refused() -> None:
    with pytest.raises(StructureError, match="not symmetric"):
        CgOperator(MatrixOperator(torch.ones(3, 3).triu().double()))
    with pytest.raises(StructureError, match="not positive semi-definite"):
        CgOperator(DiagonalOperator(torch.tensor([1.0, -1.0])))
    assert CgOperator(DiagonalOperator(torch.tensor([1.0, -1.0])), 1.5).regularization == 1.5
    with pytest.raises(TypeError, match="bfloat16"):
        CgOperator(MatrixOperator(torch.eye(3, dtype=torch.bfloat16)))
    with pytest.raises(TypeError, match="MatrixOperator"):
        CgOperator(torch.eye(3))


@pytest.mark.parametrize("maxiter", [50, 400, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_iterating_beyond_the_precision_does_not_destroy_the_solution(
    scale: float, dtype: torch.dtype, maxiter: int
) -> None:
    matrix = scale * random_spd(20, 10.0, dtype=dtype)
    operator = CgOperator(MatrixOperator(matrix), rtol=0.0, maxiter=maxiter)
    solution = operator.solve(normal(3, 20, dtype=dtype))
    assert set(solution.status) <= {SolveStatus.STAGNATED, SolveStatus.CONVERGED}
    assert float(solution.relative_residual_norms.max()) < 100 * torch.finfo(dtype).eps


def test_a_tighter_tolerance_gives_no_worse_an_answer() -> None:
    matrix, rhs = MatrixOperator(random_spd(60, 1e12)), normal(5, 60)
    worst = [
        float(CgOperator(matrix, rtol=rtol, maxiter=3000).solve(rhs).relative_residual_norms.max())
        for rtol in (1e-3, 1e-9)
    ]
    assert worst[1] <= 2 * worst[0]


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_the_scale_of_a_float32_operator_does_not_matter(scale: float) -> None:
    operator = MatrixOperator(scale * random_spd(8, 10.0, dtype=torch.float32))
    solution = CgOperator(operator).solve(normal(3, 8, dtype=torch.float32))
    assert bool(solution.converged.all())


def test_a_solution_that_overflows_or_becomes_subnormal_is_not_called_converged() -> None:
    def solved(operator_scale: float, rhs_scale: float) -> Solution:
        operator = MatrixOperator(operator_scale * random_spd(8, 10.0, dtype=torch.float32))
        return CgOperator(operator).solve(rhs_scale * torch.ones(8))

    overflown, subnormal = solved(1e-20, 1e25), solved(1e10, 1e-35)
    assert overflown.status == (SolveStatus.NON_FINITE,)
    assert bool(overflown.value.isfinite().all())
    assert subnormal.status == (SolveStatus.STAGNATED,)


def test_iterations_stay_within_the_budget() -> None:
    for maxiter in (1, 2, 5, 9):
        operator = CgOperator(MatrixOperator(random_spd(40, 1e9)), rtol=1e-12, maxiter=maxiter)
        assert int(operator.solve(normal(4, 40)).iterations.max()) <= maxiter


def test_what_failed_is_no_worse_than_zero() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1e-3, 0.0, 0.0])).double()
    solution = CgOperator(MatrixOperator(matrix)).solve(normal(6, 4))
    assert set(solution.status) == {SolveStatus.BREAKDOWN}
    assert bool((solution.relative_residual_norms <= 1).all())
