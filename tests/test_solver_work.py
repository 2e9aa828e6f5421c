"""What the solvers do beside the products: waits for the device, stacks held, others' tensors."""

from __future__ import annotations

import pytest
import torch
from reference import random_spd
from solver_cases import normal, true_residuals
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hessops import (
    CgOperator,
    DirectInverse,
    MatrixOperator,
    MinresOperator,
    SolveStatus,
    TensorOperator,
)
from hessops.errors import ArgumentError

# Operations after which the host knows a value, so that on a GPU it waits for it.
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")


class CountingWaits(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITS:
            self.count += 1
        return func(*args, **(kwargs or {}))


def waits(inverse: CgOperator | MinresOperator, steps: int) -> int:
    inverse.maxiter = steps
    with CountingWaits() as counting:
        solution = inverse.solve(normal(5, 40))
    assert solution.iterations.tolist() == [steps] * 5
    return counting.count


@pytest.mark.parametrize(
    ("make", "per_step"),
    [
        (CgOperator, 1),
        (MinresOperator, 1),
        (lambda operator: CgOperator(operator, use_block_cg=True), 3),
    ],
    ids=["cg", "minres", "block cg"],
)
def test_a_step_waits_for_the_device_a_fixed_number_of_times(make, per_step: int) -> None:
    # So ill-conditioned that no residual falls far enough to be verified on the way.
    inverse = make(MatrixOperator(torch.diag(torch.logspace(-9, 0, 40).double())))
    inverse.rtol = 1e-15
    assert waits(inverse, 5) - waits(inverse, 2) == 3 * per_step


class Itself(TensorOperator):
    """The identity whose hook returns the very rows that it is given."""

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return rows


@pytest.mark.parametrize("use_block_cg", [False, True])
def test_a_hook_may_return_its_argument(use_block_cg: bool) -> None:
    same = Itself(20, torch.float64, "cpu", symmetric=True, positive_semidefinite=True)
    matrix, rhs = random_spd(20, 1e3), normal(4, 20)
    solution = CgOperator(same, use_block_cg=use_block_cg).solve(rhs)
    assert torch.allclose(solution.value, rhs)
    inverse = CgOperator(MatrixOperator(matrix), preconditioner=same, use_block_cg=use_block_cg)
    solution = inverse.solve(rhs)
    assert bool(solution.converged.all())
    assert float(true_residuals(matrix, rhs, solution.value).max()) <= 1.001e-7


@pytest.mark.parametrize("use_block_cg", [False, True])
def test_right_hand_sides_and_starts_are_left_as_they_are(use_block_cg: bool) -> None:
    matrix, rhs, start = random_spd(20, 1e3), normal(4, 20), normal(4, 20, seed=2)
    kept = rhs.clone(), start.clone()
    CgOperator(MatrixOperator(matrix), use_block_cg=use_block_cg).solve(rhs, x0=start)
    assert torch.equal(rhs, kept[0])
    assert torch.equal(start, kept[1])


class Overwriting(DirectInverse):
    def _inverse_rows(self, rows: Tensor) -> Tensor:
        return rows.mul_(2.0)


@pytest.mark.parametrize("use_block_cg", [False, True])
def test_a_preconditioner_that_writes_to_its_argument_is_refused(use_block_cg: bool) -> None:
    operator = MatrixOperator(random_spd(20, 1e3))
    inverse = CgOperator(operator, preconditioner=Overwriting(operator), use_block_cg=use_block_cg)
    with pytest.raises(ArgumentError, match="writes to its argument"):
        inverse.solve(normal(2, 20))


class Failing(MatrixOperator):
    """A matrix whose products with the second row of a stack are infinite from the third one on."""

    fails, count, saw_finite = True, 0, True

    def _apply_rows(self, rows: Tensor) -> Tensor:
        self.count += 1
        self.saw_finite &= bool(rows.isfinite().all())
        result = super()._apply_rows(rows)
        if self.fails and self.count > 2:
            result[1, 3] = torch.inf
        return result


@pytest.mark.parametrize("method", [CgOperator, MinresOperator])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_an_infinite_product_of_one_row_does_not_reach_the_others(method, preconditioned) -> None:
    matrix, rhs = random_spd(20, 1e3), normal(4, 20)
    nearby = torch.linalg.inv(matrix + 0.1 * torch.eye(20))
    inverse, fine, failing = Failing((nearby + nearby.T) / 2), Failing(matrix), Failing(matrix)
    inverse.fails = fine.fails = False
    given = inverse if preconditioned else None
    expected = method(fine, preconditioner=given).solve(rhs)
    solution = method(failing, preconditioner=given).solve(rhs)
    others = [0, 2, 3]
    assert solution.status[1] is SolveStatus.NON_FINITE
    assert bool(solution.value.isfinite().all())
    assert torch.equal(solution.value[others], expected.value[others])
    assert bool(expected.converged.all())
    assert failing.saw_finite
    assert inverse.saw_finite
