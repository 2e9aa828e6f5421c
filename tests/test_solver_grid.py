"""Every solver with every preconditioner, conditioning and stack of right-hand sides."""

from __future__ import annotations

import inspect
from functools import partial
from itertools import product

import pytest
import torch
from reference import random_spd
from solver_cases import (
    CELLS,
    CONDITIONING,
    PRECONDITIONED,
    RIGHT_HAND_SIDES,
    SIZE,
    SOLVERS,
    normal,
    solve_cell,
    true_residuals,
)
from torch import nn

from hessops import (
    BlockDiagonalPreconditioner,
    CgOperator,
    ClosedFormInverse,
    DiagonalOperator,
    DirectSolveOperator,
    GeneralizedGaussNewtonOperator,
    LissaOperator,
    LowRankOperator,
    LowRankProductOperator,
    LowRankProductRepresentation,
    MatrixOperator,
    MinresOperator,
    NystroemPreconditioner,
    SolveStatus,
)
from hessops.errors import (
    DeviceError,
    MissingInverseError,
    SingularOperatorError,
    StructureError,
)

HONEST_FAILURES = {SolveStatus.MAX_ITERATIONS, SolveStatus.STAGNATED}


# Matrices that are regular without a shift.
pytestmark = pytest.mark.filterwarnings("ignore::hessops.errors.ZeroShiftWarning")


@pytest.mark.parametrize(("solver", "preconditioner", "conditioning", "rhs"), CELLS)
def test_the_true_residual_meets_the_tolerance_or_the_status_says_that_it_does_not(
    solver: str, preconditioner: str, conditioning: str, rhs: str
) -> None:
    matrix, vectors, _, solution = solve_cell(solver, preconditioner, conditioning, rhs)
    assert solution.value.shape == vectors.shape
    assert bool(solution.value.isfinite().all())
    assert not solution.value.requires_grad
    true = true_residuals(matrix, vectors, solution.value)
    rtol = solution.tolerances.double() / torch.where(
        solution.rhs_norms > 0, solution.rhs_norms, 1.0
    )
    # What the sums of the reference and of the solver round differently: eps‖A‖‖x‖, with ‖A‖ = 1.
    sizes = solution.value.reshape(len(true), -1).double().norm(dim=1)
    sizes = sizes / torch.where(solution.rhs_norms > 0, solution.rhs_norms, 1.0)
    slack = 50 * torch.finfo(matrix.dtype).eps * (1 + sizes)
    for row, status in enumerate(solution.status):
        if status is SolveStatus.CONVERGED:
            assert true[row] <= rtol[row] + slack[row]
        else:
            assert status in HONEST_FAILURES
            assert true[row] >= rtol[row] - slack[row]
            assert len(status.advice) > 20
    reported = solution.relative_residual_norms.double()
    assert bool(((reported - true).abs() <= 0.01 * true + slack).all())


# The cells that converge as they should; the others would be out of iterations with any tolerance
# and prove nothing about right answers.
HARD = {
    ("cg", "none", "1e8"),
    ("cg", "jacobi", "1e8"),
    ("minres", "none", "1e8"),
    ("minres", "jacobi", "1e8"),
    ("block cg", "none", "1e8"),
    ("block cg", "jacobi", "1e8"),
    *(("lissa", "none", conditioning) for conditioning in ("1e4", "1e8", "float32 1e3")),
}


@pytest.mark.parametrize(
    ("solver", "preconditioner", "conditioning", "rhs"),
    [cell for cell in CELLS if cell[:3] not in HARD],
)
def test_what_is_not_too_hard_converges(
    solver: str, preconditioner: str, conditioning: str, rhs: str
) -> None:
    *_, solution = solve_cell(solver, preconditioner, conditioning, rhs)
    assert solution.status == (SolveStatus.CONVERGED,) * len(solution.status)


@pytest.mark.parametrize("rhs", RIGHT_HAND_SIDES)
def test_block_cg_solves_even_the_worst_conditioned_system_for_several(rhs: str) -> None:
    *_, solution = solve_cell("block cg", "none", "1e8", rhs)
    assert bool(solution.converged.all())


def test_the_grid_has_every_cell() -> None:
    named = {cell[0] for cell in CELLS}
    assert named == set(SOLVERS)
    per_solver = len(CONDITIONING) * len(RIGHT_HAND_SIDES)
    assert len(CELLS) == per_solver * (4 * len(PRECONDITIONED) + 3)
    for solver in (LissaOperator, DirectSolveOperator, LowRankOperator):
        assert "preconditioner" not in inspect.signature(solver).parameters


@pytest.mark.parametrize(
    ("solver", "preconditioner"), list(product(PRECONDITIONED, ("none", "jacobi", "nystroem")))
)
def test_two_equal_calls_are_bitwise_equal_and_leave_the_random_state(
    solver: str, preconditioner: str
) -> None:
    state = torch.get_rng_state()
    first = solve_cell(solver, preconditioner, "1e4", "5")[-1]
    second = solve_cell(solver, preconditioner, "1e4", "5")[-1]
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.residual_norms, second.residual_norms)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("solver", SOLVERS)
def test_results_carry_no_graph(solver: str) -> None:
    matrix = random_spd(SIZE, 10.0)
    rhs = normal(2, SIZE).requires_grad_()
    inverse = SOLVERS[solver](matrix, None)
    assert not inverse.apply(rhs).requires_grad
    solution = inverse.solve(rhs)
    tensors = (solution.value, solution.residual_norms, solution.smallest_curvatures)
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("solver", ["cg", "block cg", "minres", "lissa"])
def test_a_warm_start_near_the_solution_saves_steps(solver: str) -> None:
    matrix, rhs = random_spd(SIZE, 1e2), normal(2, SIZE)
    inverse = SOLVERS[solver](matrix, None)
    cold = inverse.solve(rhs)
    exact = torch.linalg.solve(matrix, rhs.T).T
    near = exact + 1e-6 * normal(2, SIZE, seed=9) * exact.norm(dim=1, keepdim=True)
    warm = inverse.solve(rhs, x0=near)
    assert bool(warm.converged.all())
    assert int(warm.iterations.max()) < int(cold.iterations.max())
    assert bool((true_residuals(matrix, rhs, warm.value) <= 1.01 * inverse.rtol).all())


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_at_the_solution_takes_no_step(solver: str) -> None:
    matrix, rhs = random_spd(SIZE, 10.0), normal(2, SIZE)
    exact = torch.linalg.solve(matrix, rhs.T).T
    solution = SOLVERS[solver](matrix, None).solve(rhs, x0=exact)
    assert bool(solution.converged.all())
    # The recursion of LiSSA looks at its residual by a step.
    assert int(solution.iterations.max()) <= (1 if solver == "lissa" else 0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_far_away_does_no_harm(solver: str) -> None:
    matrix, rhs = random_spd(SIZE, 10.0), normal(3, SIZE)
    rhs[1] = 0
    start = 1e6 * normal(3, SIZE, seed=4)
    solution = SOLVERS[solver](matrix, None).solve(rhs, x0=start)
    assert bool(solution.converged.all())
    assert solution.value[1].count_nonzero() == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_that_does_not_fit_is_refused(solver: str) -> None:
    inverse = SOLVERS[solver](random_spd(SIZE, 10.0), None)
    for start, error in (
        (normal(SIZE), ValueError),
        (normal(3, SIZE), ValueError),
        (normal(2, SIZE).float(), TypeError),
        (normal(2, SIZE) / 0, ValueError),
    ):
        with pytest.raises(error, match="x0"):
            inverse.solve(normal(2, SIZE), x0=start)


@pytest.mark.parametrize("solver", ["cg", "block cg", "minres", "lissa"])
def test_the_history_has_an_entry_for_the_start_and_each_step(solver: str) -> None:
    matrix, rhs = random_spd(SIZE, 10.0), normal(3, SIZE)
    inverse = SOLVERS[solver](matrix, None)
    assert inverse.solve(rhs).residual_history is None
    rhs[2] = 0
    exact = torch.linalg.solve(matrix, rhs.T).T
    partly = torch.stack([exact[0], torch.zeros(SIZE).double(), exact[2]])
    for start in (None, normal(3, SIZE, seed=5), partly):
        solution = inverse.solve(rhs, x0=start, history=True)
        assert solution.residual_history is not None
        for row, history in enumerate(solution.residual_history):
            assert history.shape == (int(solution.iterations[row]) + 1,)
            assert history[-1] <= 1.01 * solution.tolerances[row]
        first = torch.stack([history[0] for history in solution.residual_history])
        at_start = rhs.clone() if start is None else rhs - start @ matrix
        at_start[2] = 0  # solved by zero, whatever the start
        # Of a start that is worse than zero no use is made; LiSSA does not measure it.
        expected = at_start.norm(dim=1)
        expected = expected if solver == "lissa" else expected.minimum(rhs.norm(dim=1))
        if solver != "lissa" or start is not None:
            assert torch.allclose(first, expected, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("solver", ["cg", "block cg", "minres", "lissa"])
def test_progress_is_shown_on_request_only(solver: str, capsys) -> None:
    inverse = SOLVERS[solver](random_spd(SIZE, 10.0), None)
    inverse.solve(normal(SIZE))
    assert capsys.readouterr().err == ""
    inverse.progress = True  # type: ignore[attr-defined]
    inverse.solve(normal(SIZE))
    shown = capsys.readouterr().err
    assert "residual" in shown or "update" in shown


def test_a_report_says_how_it_ended_and_what_to_change() -> None:
    *_, solution = solve_cell("cg", "nystroem", "1e4", "5")
    report = solution.report()
    assert "5 of 5 converged" in report
    assert f"{solution.num_preconditioner_applications} of the preconditioner" in report
    *_, short = solve_cell("lissa", "none", "1e8", "5")
    assert "raise maxiter" in short.report()
    assert short.advice == tuple(status.advice for status in short.status)


# --- direct solves of operators ------------------------------------------------------------


def test_a_direct_solve_takes_any_operator() -> None:
    matrix, rhs = random_spd(SIZE, 1e3), normal(3, SIZE)
    operator = 0.5 * MatrixOperator(matrix) + 0.5 * MatrixOperator(matrix).shift(1e-3)
    inverse = operator.inverse(DirectSolveOperator)
    damped = matrix + 5e-4 * torch.eye(SIZE).double()
    assert float(true_residuals(damped, rhs, inverse.apply(rhs)).max()) <= 1e-12
    changed = inverse.with_regularization(1.0)
    more = damped + torch.eye(SIZE).double()
    assert float(true_residuals(more, rhs, changed.apply(rhs)).max()) <= 1e-12


def test_a_direct_solve_of_a_network_follows_its_refreshed_model() -> None:
    model = nn.Linear(3, 2).double()
    data = [(normal(20, 3), normal(20, 2, seed=3).softmax(dim=1))]
    ggn = GeneralizedGaussNewtonOperator(model, nn.CrossEntropyLoss(), data)
    inverse = ggn.inverse(partial(DirectSolveOperator, regularization=0.1))
    rhs = normal(2, ggn.input_size)
    before = inverse.apply(rhs)
    assert inverse.space == ggn.space
    assert inverse.apply_to_dict(ggn.space.unflatten(rhs)).keys() == set(ggn.space.names)
    with torch.no_grad():
        model.weight.mul_(3)
    assert torch.equal(inverse.apply(rhs), before)
    inverse.refresh()
    dense = ggn.to_dense() + 0.1 * torch.eye(ggn.input_size).double()
    assert float(true_residuals(dense, rhs, inverse.apply(rhs)).max()) <= 1e-12
    assert not torch.allclose(inverse.apply(rhs), before)


def test_a_direct_solve_of_an_operator_that_is_not_symmetric_is_right() -> None:
    matrix = normal(6, 6)
    inverse = DirectSolveOperator(MatrixOperator(matrix) @ MatrixOperator(matrix))
    rhs = normal(2, 6)
    assert float(true_residuals(matrix @ matrix, rhs, inverse.apply(rhs)).max()) <= 1e-10


def test_a_singular_operator_is_refused_with_its_condition() -> None:
    operator = LowRankProductOperator(
        LowRankProductRepresentation(torch.ones(2).double(), torch.eye(5).double()[:, :2])
    )
    with pytest.raises(SingularOperatorError, match="singular"):
        operator.inverse(DirectSolveOperator)
    with pytest.raises(ValueError, match="in_place_regularization"):
        DirectSolveOperator(operator, 1.0, in_place_regularization=True)


@pytest.mark.parametrize(
    "solver", [CgOperator, partial(CgOperator, use_block_cg=True), MinresOperator]
)
def test_any_solver_inverts_any_operator_by_one_line(solver) -> None:
    matrix, rhs = random_spd(SIZE, 1e3), normal(3, SIZE)
    operator = MatrixOperator(matrix).shift(0.1)
    inverse = operator.inverse(partial(solver, rtol=1e-9))
    damped = matrix + 0.1 * torch.eye(SIZE).double()
    assert float(true_residuals(damped, rhs, inverse.apply(rhs)).max()) <= 1.01e-9
    with pytest.raises(MissingInverseError, match=r"inverse\(partial\(CgOperator, rtol=1e-6\)\)"):
        (MatrixOperator(matrix) + MatrixOperator(matrix)).inverse()


def test_a_regularization_that_leaves_an_operator_indefinite_is_refused_again() -> None:
    operator = DiagonalOperator(torch.tensor([1.0, -1.0]))
    inverse = CgOperator(operator, 2.0)
    with pytest.raises(StructureError, match="not positive semi-definite"):
        inverse.with_regularization(0.0)


# --- the ends of the range of the dtype ------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("factor", [1e-30, 1e-24, 1e24, 1e30])
def test_right_hand_sides_at_the_ends_of_float32_are_solved(solver: str, factor: float) -> None:
    matrix = random_spd(8, 10.0, dtype=torch.float32)
    rhs = normal(3, 8, dtype=torch.float32)
    solution = SOLVERS[solver](matrix, None).solve(factor * rhs)
    assert bool(solution.converged.all())
    unscaled = solution.value.double() / factor
    assert float(true_residuals(matrix, rhs, unscaled).max()) <= 1.2e-4
    assert torch.allclose(solution.rhs_norms, factor * rhs.double().norm(dim=1), rtol=1e-5)
    assert bool(solution.relative_residual_norms.isfinite().all())


def test_a_direct_solution_that_underflows_is_not_called_converged() -> None:
    large = DirectSolveOperator(1e30 * torch.eye(2))
    solution = large.solve(torch.full((2,), 1e-25))
    assert solution.value.count_nonzero() == 0
    assert not bool(solution.converged)
    assert solution.relative_residual_norms.tolist() == [1.0]
    wrong = ClosedFormInverse(DiagonalOperator(torch.ones(2)), DiagonalOperator(5 * torch.ones(2)))
    assert not bool(wrong.solve(torch.full((2,), 1e-24)).converged)


@pytest.mark.parametrize("solver", ["cg", "block cg", "minres", "direct"])
def test_a_subnormal_entry_is_measured_and_not_condemned(solver: str) -> None:
    matrix = torch.diag(torch.tensor([1.0, 1e3]))
    rhs = torch.tensor([1e-36, 1e-36])
    solution = SOLVERS[solver](matrix, None).solve(rhs)
    true = (rhs.double() - matrix.double() @ solution.value.double()).norm()
    assert torch.allclose(solution.residual_norms, true, rtol=0.1, atol=1e-44)
    assert bool(solution.converged)


@pytest.mark.parametrize("solver", ["cg", "block cg", "minres"])
def test_a_start_beyond_the_range_is_replaced_by_zero(solver: str) -> None:
    inverse = SOLVERS[solver](torch.diag(torch.tensor([1.0, 2.0])), None)
    rhs = torch.full((2,), 1e-12)
    solution = inverse.solve(rhs, x0=torch.full((2,), 1e30), history=True)
    assert bool(solution.converged)
    assert solution.residual_history is not None
    assert bool(solution.residual_history[0].isfinite().all())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("use_block_cg", [False, True])
def test_negative_curvature_is_seen_at_any_scale(use_block_cg: bool, scale: float) -> None:
    operator = MatrixOperator(torch.diag(torch.tensor([-1.0, -2.0, -3.0])) * scale)
    recipe = BlockDiagonalPreconditioner(2)
    inverse = CgOperator(operator, preconditioner=recipe, use_block_cg=use_block_cg)
    solution = inverse.solve(torch.ones(3) * 1e-30)
    assert solution.status == (SolveStatus.INDEFINITE,)
    assert -3.1 * scale < float(solution.smallest_curvatures) < -0.9 * scale


def test_a_sketch_of_a_large_float32_operator_preconditions() -> None:
    for scale in (1e-19, 1e19, 1e30):
        operator = DiagonalOperator(torch.linspace(1, 2, 50) * scale)
        recipe = NystroemPreconditioner(5, oversampling=2)
        assert bool(CgOperator(operator, preconditioner=recipe).solve(torch.ones(50)).converged)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solving_without_values_is_refused(solver: str) -> None:
    inverse = SOLVERS[solver](random_spd(4, 10.0), None).to("meta")
    with pytest.raises(DeviceError, match="meta"):
        inverse.solve(normal(4))


def test_a_regularization_written_in_place_is_replaced_exactly() -> None:
    for dtype, first in ((torch.float32, 1e9), (torch.float64, 1e15)):
        matrix = torch.tensor([[1.3, 0.2], [0.2, 2.7]], dtype=dtype)
        inverse = DirectSolveOperator(matrix.clone(), first, in_place_regularization=True)
        value = inverse.with_regularization(1.0).apply(torch.ones(2, dtype=dtype))
        damped = matrix + torch.eye(2, dtype=dtype)
        assert torch.allclose(damped @ value, torch.ones(2, dtype=dtype), rtol=1e-5)
