"""Minimal residuals: indefinite systems, by true residuals."""

from __future__ import annotations

import pytest
import torch
from reference import random_spd
from solver_cases import Counting, Overflowing, normal, true_residuals
from torch import Tensor, nn

from hessops import (
    DiagonalOperator,
    HessianOperator,
    MatrixOperator,
    MinresOperator,
    SolveStatus,
)
from hessops.errors import PreconditionerError, SolverBreakdownError, StructureError


def indefinite(size: int, condition: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with as many negative as positive eigenvalues."""
    spd = random_spd(size, condition)
    values, vectors = torch.linalg.eigh(spd)
    signs = torch.ones(size, dtype=torch.float64)
    signs[::2] = -1
    matrix = (vectors * (values * signs)) @ vectors.T
    return ((matrix + matrix.T) / 2).to(dtype)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (43,)], ids=str)
def test_indefinite_systems_are_solved(lead: tuple[int, ...], condition: float) -> None:
    matrix, rhs = indefinite(40, condition), normal(*lead, 40)
    solution = MinresOperator(MatrixOperator(matrix), maxiter=5000).solve(rhs)
    assert bool(solution.converged.all())
    assert float(true_residuals(matrix, rhs, solution.value).max()) <= 1.001e-7


def test_float32_meets_its_tolerance() -> None:
    matrix = indefinite(40, 1e2, torch.float32)
    rhs = normal(5, 40, dtype=torch.float32)
    solution = MinresOperator(MatrixOperator(matrix)).solve(rhs)
    assert bool(solution.converged.all())
    assert float(true_residuals(matrix, rhs, solution.value).max()) <= 1.05e-4


def test_every_iterate_has_the_least_residual_of_its_krylov_space() -> None:
    matrix, rhs = indefinite(30, 20.0), normal(30)
    for steps in (1, 2, 5, 9):
        value = MinresOperator(MatrixOperator(matrix), maxiter=steps).solve(rhs).value
        powers = [rhs]
        for _ in range(steps - 1):
            powers.append(matrix @ powers[-1])
        basis, _ = torch.linalg.qr(torch.stack(powers, dim=1))
        image = matrix @ basis
        best = basis @ torch.linalg.lstsq(image, rhs.unsqueeze(1)).solution.squeeze(1)
        assert torch.allclose(value, best, rtol=1e-7, atol=1e-8)


def test_preconditioned_iterates_have_the_least_residual_in_their_own_norm() -> None:
    matrix, rhs, steps = indefinite(30, 20.0), normal(30), 4
    diagonal = 0.5 + normal(30, seed=2).square()
    inverse = MinresOperator(
        MatrixOperator(matrix), maxiter=steps, preconditioner=DiagonalOperator(1 / diagonal)
    )
    value = inverse.solve(rhs).value
    root = diagonal.rsqrt()
    split = root.unsqueeze(1) * matrix * root
    powers = [root * rhs]
    for _ in range(steps - 1):
        powers.append(split @ powers[-1])
    basis, _ = torch.linalg.qr(torch.stack(powers, dim=1))
    target = (root * rhs).unsqueeze(1)
    best = root * (basis @ torch.linalg.lstsq(split @ basis, target).solution.squeeze(1))
    assert torch.allclose(value, best, rtol=1e-7, atol=1e-8)


def test_the_residuals_never_rise() -> None:
    matrix = indefinite(40, 1e3)
    solution = MinresOperator(MatrixOperator(matrix)).solve(normal(3, 40), history=True)
    assert solution.residual_history is not None
    for history in solution.residual_history:
        assert bool((history.diff() <= 1e-12).all())


def test_a_raw_network_hessian_is_solved() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = [(torch.randn(30, 4).double(), torch.randint(3, (30,)))]
    hessian = HessianOperator(model, nn.CrossEntropyLoss(), data).shift(1e-3)
    dense = hessian.to_dense()
    assert torch.linalg.eigvalsh(dense)[0] < -1e-3
    rhs = normal(3, hessian.input_size)
    solution = MinresOperator(hessian, maxiter=3000).solve(rhs)
    assert bool(solution.converged.all())
    assert float(true_residuals(dense, rhs, solution.value).max()) <= 1.001e-7


def test_scaling_one_right_hand_side_leaves_the_others_bitwise_equal() -> None:
    operator = MinresOperator(MatrixOperator(indefinite(30, 1e3)))
    rhs = normal(4, 30)
    scaled = rhs.clone()
    scaled[1] *= 1e8
    first, second = operator.solve(rhs), operator.solve(scaled)
    others = [0, 2, 3]
    assert torch.equal(first.value[others], second.value[others])


def test_a_singular_operator_is_solved_within_its_range_and_breaks_down_outside() -> None:
    diagonal = torch.tensor([1.0, -2.0, 0.0, 5.0]).double()
    operator = MinresOperator(DiagonalOperator(diagonal))
    inside = torch.tensor([1.0, 1.0, 0.0, -1.0]).double()
    assert bool(operator.solve(inside).converged)
    solution = operator.solve(torch.ones(4).double())
    assert solution.status == (SolveStatus.BREAKDOWN,)
    least_squares = torch.tensor([1.0, -0.5, 0.0, 0.2]).double()
    assert torch.allclose(solution.value[[0, 1, 3]], least_squares[[0, 1, 3]], rtol=1e-6)
    with pytest.raises(SolverBreakdownError, match="singular"):
        operator.apply(torch.ones(4).double())


def test_a_larger_singular_operator_breaks_down_outside_its_range() -> None:
    values, vectors = torch.linalg.eigh(indefinite(60, 1e2))
    values[10:20] = 0
    matrix = (vectors * values) @ vectors.T
    matrix = (matrix + matrix.T) / 2
    inside = normal(3, 60) @ matrix
    rhs = torch.cat([inside, normal(2, 60, seed=5)])
    solution = MinresOperator(MatrixOperator(matrix)).solve(rhs)
    assert solution.converged.tolist() == [True] * 3 + [False] * 2
    assert set(solution.status[3:]) <= {SolveStatus.BREAKDOWN, SolveStatus.STAGNATED}
    least = (rhs - rhs @ torch.linalg.pinv(matrix, rtol=1e-10) @ matrix).norm(dim=1)
    assert torch.allclose(solution.residual_norms[3:], least[3:], rtol=1e-2)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_a_float32_operator_does_not_matter(scale: float) -> None:
    operator = MatrixOperator(scale * indefinite(8, 10.0, torch.float32))
    solution = MinresOperator(operator).solve(normal(3, 8, dtype=torch.float32))
    assert bool(solution.converged.all())


def test_the_zero_operator_breaks_down() -> None:
    solution = MinresOperator(MatrixOperator(torch.zeros(3, 3).double())).solve(normal(2, 3))
    assert set(solution.status) == {SolveStatus.BREAKDOWN}


def test_a_non_symmetric_operator_is_refused() -> None:
    with pytest.raises(StructureError, match=r"not symmetric.*A\.T @ A"):
        MinresOperator(MatrixOperator(torch.tensor([[1.0, 2.0], [0.0, 1.0]])))


def test_a_preconditioner_that_is_not_positive_definite_is_said() -> None:
    bad = DiagonalOperator(torch.tensor([1.0, 1.0, -1.0]).double())
    bad._positive_semidefinite = None
    inverse = MinresOperator(MatrixOperator(random_spd(3, 10.0)), preconditioner=bad)
    with pytest.raises(PreconditionerError, match="positive definite"):
        inverse.apply(normal(4, 3))


def test_non_finite_products_are_said() -> None:
    solution = MinresOperator(Overflowing()).solve(normal(2, 3))
    assert set(solution.status) == {SolveStatus.NON_FINITE}


def test_right_hand_sides_share_their_applications() -> None:
    operator = Counting(random_spd(20, 100))
    solution = MinresOperator(operator).solve(normal(15, 20))
    assert operator.count == solution.num_applications
    assert operator.count <= int(solution.iterations.max()) + 6


def test_the_defaults_are_those_of_conjugate_gradients() -> None:
    operator = MinresOperator(MatrixOperator(random_spd(7, 10.0)))
    assert (operator.rtol, operator.atol, operator.maxiter) == (1e-7, 0.0, 70)
    changed = operator.with_regularization(0.5)
    assert isinstance(changed, MinresOperator)
    assert (changed.regularization, operator.regularization) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("dtype", "eigenvalues"),
    [
        (torch.float32, [1.0, 1e-4]),
        (torch.float64, [1.0, 1e-6, 1e-8, 1e-9]),
        (torch.float64, [1.0, -1e-5, 1e-9, -1e-10]),
    ],
    ids=str,
)
def test_a_residual_along_small_eigenvalues_is_no_breakdown(
    dtype: torch.dtype, eigenvalues: list[float]
) -> None:
    operator = DiagonalOperator(torch.tensor(eigenvalues, dtype=dtype))
    inverse = MinresOperator(operator, maxiter=400)
    solution = inverse.solve(torch.ones(len(eigenvalues), dtype=dtype))
    # Such small systems are at the limit of the dtype.
    assert solution.status[0] in (SolveStatus.CONVERGED, SolveStatus.STAGNATED)
    assert float(solution.relative_residual_norms) <= 5 * inverse.rtol


def test_random_systems_of_condition_1e8_do_not_break_down() -> None:
    for seed in range(12):
        matrix = random_spd(20, 1e8, seed=seed)
        solution = MinresOperator(MatrixOperator(matrix), maxiter=2000).solve(normal(3, 20))
        assert SolveStatus.BREAKDOWN not in solution.status
