"""Block conjugate gradients: one Krylov space for all, and for each its own tolerance."""

from __future__ import annotations

import pytest
import torch
from reference import random_spd
from solver_cases import Counting, Overflowing, normal, true_residuals
from torch import Tensor, nn

from hessops import (
    CgOperator,
    DiagonalOperator,
    GeneralizedGaussNewtonOperator,
    MatrixOperator,
    NystroemPreconditioner,
    SolveStatus,
    TensorOperator,
)
from hessops.errors import ConvergenceWarning, IndefiniteOperatorError, PreconditionerError


def block(matrix: Tensor | TensorOperator, **settings) -> CgOperator:
    operator = matrix if isinstance(matrix, TensorOperator) else MatrixOperator(matrix)
    return CgOperator(operator, use_block_cg=True, **settings)


def test_a_hard_system_with_a_duplicate_a_zero_and_unequal_scales() -> None:
    matrix = random_spd(100, 1e8)
    rhs = normal(5, 100)
    rhs[3] = rhs[1]
    rhs[4] = 0
    rhs[0] *= 1e6
    rhs[2] *= 1e-6
    shared, alone = Counting(matrix), Counting(matrix)
    solution = block(shared).solve(rhs)
    plain = CgOperator(alone, maxiter=20000).solve(rhs)
    assert bool(solution.converged.all())
    assert bool(plain.converged.all())
    assert float(true_residuals(matrix, rhs, solution.value).max()) <= 1.001e-7
    assert torch.equal(solution.value[3], solution.value[1]) or torch.allclose(
        solution.value[3], solution.value[1], rtol=1e-4
    )
    assert shared.count == solution.num_applications
    assert 5 * shared.count < alone.count


def test_as_many_right_hand_sides_as_parameters_take_one_step() -> None:
    matrix = random_spd(30, 1e6)
    for rhs in (normal(30, 30), normal(33, 30)):
        solution = block(matrix).solve(rhs)
        assert bool(solution.converged.all())
        assert int(solution.iterations.max()) == 1
        assert solution.num_applications == 2


def test_exactly_dependent_right_hand_sides_cost_no_more_than_their_span() -> None:
    matrix, base = random_spd(60, 1e4), normal(3, 60)
    dependent = torch.cat([base, normal(10, 3, seed=2) @ base])
    few, many = block(matrix).solve(base), block(matrix).solve(dependent)
    assert bool(many.converged.all())
    assert int(many.iterations.max()) <= int(few.iterations.max()) + 2


def test_nearly_dependent_right_hand_sides_are_solved() -> None:
    matrix, base = random_spd(40, 1e4), normal(1, 40)
    for size in (1e-3, 1e-7, 1e-12, 1e-15):
        rhs = base + size * normal(6, 40, seed=3)
        solution = block(matrix).solve(rhs)
        assert bool(solution.converged.all())
        assert float(true_residuals(matrix, rhs, solution.value).max()) <= 1.001e-7


@pytest.mark.parametrize("condition", [1e1, 1e3])
def test_float32_meets_its_tolerance(condition: float) -> None:
    matrix = random_spd(80, condition, dtype=torch.float32)
    rhs = normal(12, 80, dtype=torch.float32)
    rhs[5] = rhs[2] * 1e-20
    solution = block(matrix).solve(rhs)
    assert bool(solution.converged.all())
    assert float(true_residuals(matrix, rhs, solution.value).max()) <= 1.05e-4


def test_each_tolerance_is_met_whatever_the_others_are() -> None:
    matrix = random_spd(50, 1e4)
    rhs = normal(4, 50)
    rhs[0] = matrix @ normal(50, seed=7)  # an easy one
    easy = torch.linalg.eigh(matrix).eigenvectors[:, -1]
    rhs[1] = easy  # solved in a step
    rhs[2] *= 1e9
    solution = block(matrix).solve(rhs)
    assert bool(solution.converged.all())
    assert float(true_residuals(matrix, rhs, solution.value).max()) <= 1.001e-7


def test_a_solved_right_hand_side_keeps_the_value_that_was_verified() -> None:
    matrix = random_spd(60, 1e6)
    rhs = normal(3, 60)
    rhs[0] = torch.linalg.eigh(matrix).eigenvectors[:, -1]
    solution = block(matrix).solve(rhs)
    assert solution.iterations[0] < solution.iterations[1:].min()
    residual = true_residuals(matrix, rhs, solution.value)
    assert torch.allclose(residual, solution.relative_residual_norms, rtol=0.05, atol=1e-13)


def test_of_one_right_hand_side_it_is_plain_conjugate_gradients() -> None:
    matrix, rhs = random_spd(40, 1e3), normal(40)
    first = block(matrix).solve(rhs)
    second = CgOperator(MatrixOperator(matrix)).solve(rhs)
    assert abs(int(first.iterations) - int(second.iterations)) <= 2
    assert torch.allclose(first.value, second.value, rtol=1e-4, atol=1e-5)


def test_the_iterates_are_those_of_the_projection_on_the_shared_space() -> None:
    """After t steps X minimises the error in the norm of A over span(B, AB, ..., A^(t-1) B)."""
    matrix, rhs = random_spd(30, 50.0), normal(3, 30)
    for steps in (1, 2, 4):
        value = block(matrix, maxiter=steps).solve(rhs).value
        powers = [rhs.T]
        for _ in range(steps - 1):
            powers.append(matrix @ powers[-1])
        basis, _ = torch.linalg.qr(torch.cat(powers, dim=1))
        projected = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ rhs.T)
        assert torch.allclose(value, projected.T, rtol=1e-9, atol=1e-10)


def test_preconditioned_iterates_are_those_of_the_projection_too() -> None:
    matrix, rhs = random_spd(30, 50.0), normal(2, 30)
    inverse = torch.linalg.inv(matrix + 0.1 * torch.diag(normal(30, seed=4).square()))
    inverse = (inverse + inverse.T) / 2
    value = block(matrix, maxiter=3, preconditioner=MatrixOperator(inverse)).solve(rhs).value
    powers = [inverse @ rhs.T]
    for _ in range(2):
        powers.append(inverse @ matrix @ powers[-1])
    basis, _ = torch.linalg.qr(torch.cat(powers, dim=1))
    projected = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ rhs.T)
    assert torch.allclose(value, projected.T, rtol=1e-8, atol=1e-9)


def test_running_out_of_iterations_is_said_with_the_true_residual() -> None:
    matrix, rhs = random_spd(60, 1e6), normal(4, 60)
    solution = block(matrix, maxiter=3).solve(rhs)
    assert set(solution.status) == {SolveStatus.MAX_ITERATIONS}
    assert solution.iterations.tolist() == [3] * 4
    assert torch.allclose(
        solution.relative_residual_norms, true_residuals(matrix, rhs, solution.value), rtol=1e-6
    )
    with pytest.warns(ConvergenceWarning, match="raise maxiter"):
        block(matrix, maxiter=3).apply(rhs)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-9), (torch.float64, 1e-18)], ids=str
)
def test_stagnation_at_the_precision_of_the_dtype_is_said(dtype: torch.dtype, rtol: float) -> None:
    matrix = random_spd(30, 1e3, dtype=dtype)
    solution = block(matrix, rtol=rtol).solve(normal(3, 30, dtype=dtype))
    assert set(solution.status) == {SolveStatus.STAGNATED}
    assert float(solution.relative_residual_norms.max()) < 1e3 * torch.finfo(dtype).eps


def test_an_indefinite_operator_raises() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, -0.5, 0.7, 0.1])).double()
    with pytest.raises(IndefiniteOperatorError, match="MinresOperator"):
        block(matrix).apply(normal(2, 6))
    solution = block(matrix).solve(normal(2, 6))
    assert set(solution.status) == {SolveStatus.INDEFINITE}
    assert solution.smallest_curvatures.max() < 0


def test_a_singular_operator_is_solved_within_its_range_and_breaks_down_outside() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0, 5.0])).double()
    inside = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 3.0, 0.0, 1.0]]).double()
    assert bool(block(matrix).solve(inside).converged.all())
    mixed = torch.cat([inside, torch.tensor([[0.0, 0.0, 1.0, 0.0]]).double()])
    solution = block(matrix).solve(mixed)
    assert solution.status == (
        SolveStatus.CONVERGED,
        SolveStatus.CONVERGED,
        SolveStatus.BREAKDOWN,
    )
    assert bool(solution.value.isfinite().all())


def test_a_singular_operator_of_larger_size_breaks_down_outside_its_range() -> None:
    factor = normal(12, 30)
    matrix = factor.T @ factor / 30
    inside = normal(4, 12, seed=2) @ factor
    rhs = torch.cat([inside, normal(2, 30, seed=3)])
    solution = block(matrix).solve(rhs)
    assert solution.converged.tolist() == [True] * 4 + [False] * 2
    assert set(solution.status[4:]) <= {SolveStatus.BREAKDOWN, SolveStatus.STAGNATED}
    assert bool(solution.value.isfinite().all())


def test_the_zero_operator_breaks_down() -> None:
    solution = block(torch.zeros(3, 3).double()).solve(normal(2, 3))
    assert set(solution.status) == {SolveStatus.BREAKDOWN}


def test_non_finite_products_are_said() -> None:
    solution = block(Overflowing()).solve(normal(2, 3))
    assert set(solution.status) == {SolveStatus.NON_FINITE}
    assert bool(solution.value.isfinite().all())


def test_a_preconditioner_that_is_not_positive_definite_is_said() -> None:
    bad = DiagonalOperator(torch.tensor([1.0, 1.0, -1.0]).double())
    bad._positive_semidefinite = None  # as an operator that does not know
    inverse = block(random_spd(3, 10.0), preconditioner=bad)
    with pytest.raises(PreconditionerError, match="positive definite"):
        inverse.apply(normal(2, 3))


@pytest.mark.parametrize("preconditioner", [None, NystroemPreconditioner(rank=12)], ids=str)
def test_thirty_two_right_hand_sides_take_fewer_passes_over_the_data(preconditioner) -> None:
    class CountingLoader(list[tuple[Tensor, Tensor]]):
        passes = 0

        def __iter__(self):
            CountingLoader.passes += 1
            return super().__iter__()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    data = CountingLoader((torch.randn(40, 6).double(), torch.randint(4, (40,))) for _ in range(3))
    rhs = normal(32, sum(p.numel() for p in model.parameters()))

    def passes(vectors: Tensor, *, use_block_cg: bool) -> int:
        operator = GeneralizedGaussNewtonOperator(model, nn.CrossEntropyLoss(), data, cache=False)
        inverse = CgOperator(
            operator, 1e-3, preconditioner=preconditioner, use_block_cg=use_block_cg
        )
        CountingLoader.passes = 0
        solution = inverse.solve(vectors)
        assert bool(solution.converged.all())
        fitting = 0 if preconditioner is None else 1
        assert CountingLoader.passes == solution.num_applications + fitting
        return CountingLoader.passes

    shared = passes(rhs, use_block_cg=True)
    together = passes(rhs, use_block_cg=False)
    one_by_one = sum(passes(row, use_block_cg=False) for row in rhs[:8])
    assert 2 * shared < together
    assert 10 * together < 4 * one_by_one


def test_a_solve_from_a_start_has_the_right_answer_for_all() -> None:
    matrix, rhs = random_spd(50, 1e5), normal(6, 50)
    rhs[2] = 0
    start = normal(6, 50, seed=8)
    start[4] = 0
    solution = block(matrix).solve(rhs, x0=start)
    assert bool(solution.converged.all())
    assert float(true_residuals(matrix, rhs, solution.value).max()) <= 1.001e-7


def test_the_rank_of_the_right_hand_sides_is_what_is_multiplied() -> None:
    class Recording(Counting):
        def _apply_rows(self, rows: Tensor) -> Tensor:
            widths.append(len(rows))
            return super()._apply_rows(rows)

    widths: list[int] = []
    matrix, base = random_spd(60, 1e2), normal(3, 60)
    dependent = torch.cat([base, normal(10, 3, seed=2) @ base, torch.zeros(2, 60).double()])
    block(Recording(matrix)).solve(dependent)
    assert widths[0] == 3
    # Parts far below the tolerance are left out, too.
    widths.clear()
    near = dependent + 1e-11 * normal(15, 60, seed=6)
    near[13:] = 0
    solution = block(Recording(matrix)).solve(near)
    assert widths[0] == 3
    assert bool(solution.converged.all())
