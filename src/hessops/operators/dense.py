"""Explicit matrices, and direct solves with them."""

from __future__ import annotations

import copy
from typing import Self

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from hessops.errors import ArgumentError, DtypeError, ShapeError, SingularOperatorError
from hessops.operators.base import TensorOperator
from hessops.operators.determinant import sum_of_logarithms
from hessops.operators.diagonal import require_space
from hessops.operators.eigen import CUTOFF_FACTOR
from hessops.operators.inverse import DirectInverse
from hessops.space import ParameterSpace
from hessops.validation import checked_floating, checked_regularization


class MatrixOperator(TensorOperator):
    """An explicit matrix as an operator.

    Args:
        matrix: A, shape ``(n, n)``, real floating point.
        symmetric: Whether A = Aᵀ; ``None`` looks: symmetric up to rounding counts as symmetric.
        positive_semidefinite: Whether it is; ``None`` for unknown.
        space: The parameters that the entries of a vector stand for, if they do.
        copy: ``False`` shares the caller's matrix, which must not be written to afterwards.

    Raises:
        ArgumentTypeError: `matrix` is not a tensor.
        ShapeError: It is not square, or does not fit `space`.
        DtypeError: It is not real floating point, or of another dtype than `space`.
        DeviceError: It is on another device than `space`.
        NonFiniteError: It holds NaN or infinity.

    Example:
        >>> import torch
        >>> from hessops import MatrixOperator
        >>> A = MatrixOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> A.apply(torch.tensor([1.0, 0.0]))
        tensor([2., 1.])
        >>> A.shift(1.0).inverse().apply(torch.tensor([4.0, 4.0])).round(decimals=4)
        tensor([1., 1.])
    """

    def __init__(
        self,
        matrix: Tensor,
        *,
        symmetric: bool | None = None,
        positive_semidefinite: bool | None = None,
        space: ParameterSpace | None = None,
        copy: bool = True,
    ) -> None:
        _checked_square(matrix, space)
        self.matrix = matrix.detach().clone() if copy else matrix.detach()
        super().__init__(
            len(matrix),
            matrix.dtype,
            matrix.device,
            symmetric=_is_symmetric(self.matrix) if symmetric is None else symmetric,
            positive_semidefinite=positive_semidefinite,
            space=space,
        )

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix.T

    def _apply_rows_adjoint(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix

    def _exact_diagonal(self) -> Tensor:
        return self.matrix.diagonal().double()

    def _exact_squared_norm(self) -> float:
        norm: float = torch.linalg.vector_norm(self.matrix, dtype=torch.float64).item()
        return norm**2

    def _closed_form_inverse(self, shift: float) -> TensorOperator:
        shifted = _shifted(self.matrix, shift) if shift else self.matrix
        inverse = DirectSolveOperator(shifted, space=self.space)
        # The shift may have made it indefinite or definite; without one, what is known stays.
        if shift == 0:
            inverse._positive_semidefinite = self.positive_semidefinite
        return inverse

    def _exact_logdet(self, scale: float, shift: float) -> float | None:
        if not self.symmetric or self.matrix.is_meta:
            return None
        matrix = scale * self.matrix.double()
        matrix = _shifted((matrix + matrix.T) / 2, shift)
        factor, failures = torch.linalg.cholesky_ex(matrix)
        diagonal = matrix.diagonal()
        precision = CUTOFF_FACTOR * torch.finfo(self.dtype).eps
        # A pivot that is the rounding of its diagonal entry: it may be zero or negative.
        if bool(failures) or bool((factor.diagonal().square() <= precision * diagonal).any()):
            values = torch.linalg.eigvalsh(matrix)
            return sum_of_logarithms(values, precision * values.abs().max(), type(self).__name__)
        return float(2 * factor.diagonal().log().sum().item())

    def _move(self, device: torch.device) -> Self:
        moved = self._copy_on(device)
        moved.matrix = self.matrix.to(device)
        return moved


class DirectSolveOperator(DirectInverse):
    r"""The inverse :math:`(A + \lambda I)^{-1}` of an explicit matrix, factorised once.

    By Cholesky where the matrix is symmetric positive definite, by LU otherwise. Matrices that are
    singular to working precision are refused.

    Args:
        matrix: A, shape ``(n, n)``, float32 or float64; or any operator, of which the matrix is
            made by n products (see `TensorOperator.to_dense`).
        regularization: λ >= 0; ``None`` is 0.
        in_place_regularization: Writes λ into the diagonal of the caller's `matrix` and keeps that
            matrix instead of a copy; do not write to it afterwards.
        space: The parameters that the entries of a vector stand for, if they do.

    Raises:
        ArgumentTypeError: `matrix` is neither a tensor nor an operator.
        ArgumentError: `regularization` is negative or not finite; or `matrix` is an operator and
            `in_place_regularization` or `space` is given.
        ShapeError: `matrix` is not square, or does not fit `space`.
        DtypeError: `matrix` is not float32 or float64.
        NonFiniteError: `matrix` holds NaN or infinity.
        MemoryLimitError: The matrix of an operator would not fit.
        SingularOperatorError: A + λI is singular to working precision; the estimate of its
            condition number is in the message, and `matrix` is as it was.

    Example:
        >>> import torch
        >>> from hessops import DirectSolveOperator
        >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> inverse = DirectSolveOperator(matrix, regularization=1.0)
        >>> inverse.apply(torch.tensor([4.0, 4.0])).round(decimals=4)
        tensor([1., 1.])
        >>> inverse.solve(torch.tensor([[4.0, 4.0], [8.0, 0.0]])).converged
        tensor([True, True])

        Of an operator, as a solver like any other:

        >>> from hessops import MatrixOperator
        >>> A = MatrixOperator(matrix) @ MatrixOperator(matrix)
        >>> A.inverse(DirectSolveOperator).apply(torch.tensor([9.0, 9.0])).round(decimals=4)
        tensor([1., 1.])
    """

    def __init__(
        self,
        matrix: Tensor | TensorOperator,
        regularization: float | None = None,
        in_place_regularization: bool = False,
        *,
        space: ParameterSpace | None = None,
    ) -> None:
        self.source = matrix if isinstance(matrix, TensorOperator) else None
        if isinstance(matrix, TensorOperator):
            if in_place_regularization or space is not None:
                raise ArgumentError(
                    "in_place_regularization and space are for a matrix, but matrix is the "
                    f"operator {type(matrix).__name__}"
                )
            space, matrix = matrix.space, _matrix_of(matrix)
        _checked_square(matrix, space)
        if matrix.dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"matrix must be float32 or float64, got {matrix.dtype}")
        shift = checked_regularization(regularization)
        # The diagonal of A, where it was written to.
        self._original_diagonal: Tensor | None = None
        if in_place_regularization:
            operator = self._factorize_in_place(matrix.detach(), shift, space)
        else:
            operator = MatrixOperator(matrix, space=space)
            self._factors = _Factors(_shifted(operator.matrix, shift) if shift else operator.matrix)
        super().__init__(operator, regularization)

    def _factorize_in_place(
        self, matrix: Tensor, shift: float, space: ParameterSpace | None
    ) -> TensorOperator:
        diagonal = matrix.diagonal().clone()
        matrix.diagonal().add_(shift)
        try:
            self._factors = _Factors(matrix)
        except BaseException:
            matrix.diagonal().copy_(diagonal)
            raise
        self._original_diagonal = diagonal
        return MatrixOperator(matrix, space=space, copy=False).shift(-shift)

    def _original(self) -> Tensor:
        """A; taking a λ that was written into the diagonal off again would leave its rounding."""
        matrix = self.operator.to_dense()
        if self._original_diagonal is not None:
            matrix.diagonal().copy_(self._original_diagonal)
        return matrix

    def _inverse_rows(self, rows: Tensor) -> Tensor:
        return self._factors.solve(rows)

    def _apply_rows_adjoint(self, rows: Tensor) -> Tensor:
        return self._factors.solve(rows, adjoint=True)

    def with_regularization(self, regularization: float | None) -> DirectSolveOperator:
        """A new factorisation with λ replaced."""
        changed = DirectSolveOperator(self._original(), regularization, space=self.space)
        changed.source = self.source
        return changed

    def refresh(self) -> Self:
        """Lets the operator it was made from take a new copy of its model, and factorises anew."""
        if self.source is not None:
            anew = DirectSolveOperator(self.source.refresh(), self.regularization)
            self.operator, self._factors = anew.operator, anew._factors
        return self

    def _move(self, device: torch.device) -> Self:
        moved = super()._move(device)
        moved.source = None if self.source is None else self.source.to(device)
        moved._factors = self._factors.to(device)
        if self._original_diagonal is not None:
            moved._original_diagonal = self._original_diagonal.to(device)
        return moved


def _matrix_of(operator: TensorOperator) -> Tensor:
    """The matrix of an operator; rounding leaves that of a symmetric one a little asymmetric."""
    matrix = operator.to_dense()
    return (matrix + matrix.T) / 2 if operator.symmetric else matrix


class _Factors:
    """A Cholesky or LU factorisation that refuses singular matrices."""

    def __init__(self, matrix: Tensor) -> None:
        self.factor, self.pivots = _factorized(matrix)
        reciprocal = self._reciprocal_condition(matrix)
        if not reciprocal > torch.finfo(matrix.dtype).eps:
            estimate = float("inf") if reciprocal == 0 else 1 / reciprocal
            raise SingularOperatorError(
                f"the matrix is singular to {matrix.dtype} precision: its condition number is "
                f"about {estimate:.1e}; use a larger regularization"
            )

    def _reciprocal_condition(self, matrix: Tensor) -> float:
        """LAPACK's estimate of 1/(‖A‖₁‖A⁻¹‖₁), on the host."""
        norm = matrix.abs().sum(dim=0).max().item()
        factor = self.factor.cpu().numpy()
        prefix = "d" if factor.dtype == np.float64 else "s"
        name = "pocon" if self.pivots is None else "gecon"
        estimate = getattr(lapack, prefix + name)
        extra = {"uplo": "L"} if self.pivots is None else {"norm": "1"}
        reciprocal, _ = estimate(factor, norm, **extra)
        return float(reciprocal)

    def solve(self, rows: Tensor, *, adjoint: bool = False) -> Tensor:
        columns = rows.T.contiguous()
        if self.pivots is None:
            solved = torch.cholesky_solve(columns, self.factor)
        else:
            solved = torch.linalg.lu_solve(self.factor, self.pivots, columns, adjoint=adjoint)
        return solved.T

    def to(self, device: torch.device) -> _Factors:
        moved = copy.copy(self)
        moved.factor = self.factor.to(device)
        moved.pivots = None if self.pivots is None else self.pivots.to(device)
        return moved


def _factorized(matrix: Tensor) -> tuple[Tensor, Tensor | None]:
    """A Cholesky factor and no pivots where there is one, an LU factorisation otherwise."""
    if _is_symmetric(matrix):
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            return factor, None
    factor, pivots, info = torch.linalg.lu_factor_ex(matrix)
    if int(info) > 0:
        raise SingularOperatorError(
            f"the matrix is singular: pivot {int(info) - 1} of its LU factorisation is zero; use a "
            "positive regularization"
        )
    return factor, pivots


def _shifted(matrix: Tensor, shift: float) -> Tensor:
    """matrix + shift·I, in memory of its own."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    return shifted


def _checked_square(matrix: Tensor, space: ParameterSpace | None) -> None:
    checked_floating(matrix, "matrix", ndim=2)
    if matrix.shape[0] != matrix.shape[1] or len(matrix) == 0:
        raise ShapeError(f"matrix must be square and not empty, got shape {tuple(matrix.shape)}")
    if space is not None:
        require_space(space, matrix, "matrix")


def _is_symmetric(matrix: Tensor) -> bool | None:
    """Whether a matrix is symmetric up to the rounding of a product that computed it.

    Entry by entry, by the scale of its row and column: one large entry does not excuse the others.
    """
    if matrix.is_meta:
        return None
    scales = matrix.abs().amax(dim=1).sqrt()
    tolerance = 10 * torch.finfo(matrix.dtype).eps * len(matrix) ** 0.5
    return bool(((matrix - matrix.T).abs() <= tolerance * torch.outer(scales, scales)).all())
