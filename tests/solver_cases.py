"""Linear systems, right-hand sides and ways to solve them, as data for the tests of solvers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from reference import random_spd
from torch import Tensor

from hessops import (
    CgOperator,
    DirectSolveOperator,
    InverseOperator,
    JacobiPreconditioner,
    LissaOperator,
    LowRankProductOperator,
    LowRankProductRepresentation,
    MatrixOperator,
    MinresOperator,
    NystroemPreconditioner,
    Preconditioner,
    Solution,
    TensorOperator,
)

SIZE = 24


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


class Counting(TensorOperator):
    """A matrix that counts its applications."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(
            len(matrix), matrix.dtype, "cpu", symmetric=True, positive_semidefinite=True
        )
        self.matrix, self.count = matrix, 0

    def _apply_rows(self, rows: Tensor) -> Tensor:
        self.count += 1
        return rows @ self.matrix.T


class Overflowing(TensorOperator):
    """An operator on R^3 whose products are infinite."""

    def __init__(self) -> None:
        super().__init__(3, torch.float64, "cpu", symmetric=True)

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return rows / 0


def true_residuals(matrix: Tensor, rhs: Tensor, value: Tensor) -> Tensor:
    """Relative residual norms in float64, zero for a zero right-hand side."""
    rhs, value = (t.double().reshape(-1, len(matrix)) for t in (rhs, value))
    norms = rhs.norm(dim=1)
    return (rhs - value @ matrix.double().T).norm(dim=1) / torch.where(norms > 0, norms, 1.0)


# name -> (dtype, condition number)
CONDITIONING = {
    "1e1": (torch.float64, 1e1),
    "1e4": (torch.float64, 1e4),
    "1e8": (torch.float64, 1e8),
    "float32 1e3": (torch.float32, 1e3),
}


def _duplicates(size: int) -> Tensor:
    rhs = normal(5, size)
    rhs[3] = rhs[1]
    rhs[4] = -2 * rhs[0] + rhs[1]
    return rhs


def _with_zero(size: int) -> Tensor:
    rhs = normal(4, size)
    rhs[2] = 0
    return rhs


def _scales(size: int) -> Tensor:
    return normal(5, size) * torch.logspace(-6, 6, 5, dtype=torch.float64).unsqueeze(1)


RIGHT_HAND_SIDES: dict[str, Callable[[int], Tensor]] = {
    "1-D": normal,
    "1": lambda n: normal(1, n),
    "5": lambda n: normal(5, n),
    "P": lambda n: normal(n, n),
    "P+3": lambda n: normal(n + 3, n),
    "duplicates": _duplicates,
    "a zero": _with_zero,
    "scales": _scales,
}

Maker = Callable[[Tensor, Preconditioner | TensorOperator | None], InverseOperator]


def _woodbury(matrix: Tensor, preconditioner: object) -> InverseOperator:
    values, vectors = torch.linalg.eigh(matrix.double())
    shift = values[0].item()
    low_rank = LowRankProductRepresentation(
        (values[1:] - shift).to(matrix.dtype), vectors[:, 1:].to(matrix.dtype)
    )
    inverse = LowRankProductOperator(low_rank).shift(shift).inverse()
    assert isinstance(inverse, InverseOperator)
    return inverse


def _krylov(solver: Callable[..., InverseOperator]) -> Maker:
    return lambda matrix, given: solver(MatrixOperator(matrix), preconditioner=given)


SOLVERS: dict[str, Maker] = {
    "cg": _krylov(CgOperator),
    "block cg": _krylov(partial(CgOperator, use_block_cg=True)),
    "minres": _krylov(MinresOperator),
    "lissa": lambda matrix, given: LissaOperator.from_operator(MatrixOperator(matrix), scale=1.0),
    "direct": lambda matrix, given: DirectSolveOperator(matrix),
    "woodbury": _woodbury,
}
PRECONDITIONED = ("cg", "block cg", "minres")


def _nearby_inverse(matrix: Tensor) -> TensorOperator:
    """The inverse of the matrix with some more on its diagonal."""
    return DirectSolveOperator(matrix, 1e-2 * matrix.diagonal().mean().item())


PRECONDITIONERS: dict[str, Callable[[Tensor], Preconditioner | TensorOperator | None]] = {
    "none": lambda matrix: None,
    "jacobi": lambda matrix: JacobiPreconditioner(),
    "nystroem": lambda matrix: NystroemPreconditioner(rank=8, oversampling=4),
    "operator": _nearby_inverse,
}

# Every cell of the grid: those solvers that take no preconditioner have one of them only.
CELLS = [
    (solver, preconditioner, conditioning, rhs)
    for solver in SOLVERS
    for preconditioner in (PRECONDITIONERS if solver in PRECONDITIONED else ("none",))
    for conditioning in CONDITIONING
    for rhs in RIGHT_HAND_SIDES
]


def solve_cell(
    solver: str, preconditioner: str, conditioning: str, rhs: str
) -> tuple[Tensor, Tensor, InverseOperator, Solution]:
    """The matrix, right-hand sides, inverse and solution of one cell."""
    dtype, condition = CONDITIONING[conditioning]
    matrix = random_spd(SIZE, condition, dtype=dtype)
    vectors = RIGHT_HAND_SIDES[rhs](SIZE).to(dtype)
    inverse = SOLVERS[solver](matrix, PRECONDITIONERS[preconditioner](matrix))
    return matrix, vectors, inverse, inverse.solve(vectors)
