"""Operators of low rank, and their damped inverses by Woodbury's identity."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from hessops.errors import ArgumentError, ArgumentTypeError, SingularOperatorError
from hessops.functional.low_rank import LowRankProductRepresentation
from hessops.operators.base import TensorOperator
from hessops.operators.determinant import rounding_of_sum, sum_of_logarithms
from hessops.operators.inverse import DirectInverse
from hessops.space import ParameterSpace
from hessops.validation import checked_number


class LowRankProductOperator(TensorOperator):
    r"""The matrix :math:`V D V^\top` as an operator.

    ``shift(λ).inverse()`` is the inverse of :math:`VDV^\top + \lambda I` by Woodbury's identity.
    Columns of V that are not orthonormal are orthonormalised; the matrix stays the same.

    Args:
        low_rank_representation: V and D.
        space: The parameters that the entries of a vector stand for, if they do.

    Raises:
        ArgumentTypeError: `low_rank_representation` is something else.

    Example:
        >>> import torch
        >>> from hessops import LowRankProductOperator, LowRankProductRepresentation
        >>> representation = LowRankProductRepresentation(torch.tensor([3.0]), torch.eye(2)[:, :1])
        >>> A = LowRankProductOperator(representation)
        >>> A.apply(torch.ones(2))
        tensor([3., 0.])
        >>> A.shift(1.0).inverse().apply(torch.ones(2))
        tensor([0.2500, 1.0000])
    """

    def __init__(
        self,
        low_rank_representation: LowRankProductRepresentation,
        *,
        space: ParameterSpace | None = None,
    ) -> None:
        representation = _checked_representation(low_rank_representation)
        if not representation.is_orthonormal():
            representation = representation.orthonormalized()
        self.low_rank_representation = representation
        values = representation.eigen_vals
        super().__init__(
            len(representation.projections),
            representation.dtype,
            representation.device,
            symmetric=True,
            positive_semidefinite=None if values.is_meta else bool((values >= 0).all()),
            space=space,
        )

    def _apply_rows(self, rows: Tensor) -> Tensor:
        basis = self.low_rank_representation.projections
        return (rows @ basis * self.low_rank_representation.eigen_vals) @ basis.T

    def _exact_eigenvalues(self) -> Tensor:
        values = self.low_rank_representation.eigen_vals.double()
        return torch.cat([values, values.new_zeros(self.input_size - len(values))])

    def _exact_diagonal(self) -> Tensor:
        representation = self.low_rank_representation
        return representation.projections.double().square() @ representation.eigen_vals.double()

    def _closed_form_inverse(self, shift: float) -> TensorOperator:
        representation = self.low_rank_representation
        if shift > 0:
            return LowRankOperator(representation, shift, space=self.space)
        if shift == 0 and representation.rank < self.input_size:
            raise SingularOperatorError(
                f"an operator of rank {representation.rank} < {self.input_size} is singular: "
                "shift it, or use LowRankOperator(..., exact=False) for the inverse on its range"
            )
        damped = _damped_eigenvalues(representation, shift)
        # V(D+s)^-1 V' + (I - VV')/s, written as V((D+s)^-1 - 1/s)V' + I/s
        offset = 1 / shift if shift else 0.0
        inverted = replace(representation, eigen_vals=1 / damped - offset)
        return LowRankProductOperator(inverted, space=self.space).shift(offset)

    def _exact_logdet(self, scale: float, shift: float) -> float | None:
        representation, name = self.low_rank_representation, type(self).__name__
        if representation.eigen_vals.is_meta:
            return None
        scaled = scale * representation.eigen_vals.double()
        rounding = rounding_of_sum(scaled, shift, self.dtype)
        inside = sum_of_logarithms(scaled + shift, rounding, name) if len(scaled) else 0.0
        codimension = self.input_size - representation.rank
        if codimension == 0:
            return inside
        outside = torch.full((1,), shift, dtype=torch.float64, device="cpu")
        return inside + codimension * sum_of_logarithms(outside, 0.0, name)

    def _move(self, device: torch.device) -> Self:
        moved = self._copy_on(device)
        moved.low_rank_representation = self.low_rank_representation.to(device)
        return moved

    def _label(self) -> str:
        return f"LowRankProductOperator(rank={self.low_rank_representation.rank})"


class LowRankOperator(DirectInverse):
    r"""The damped inverse of a matrix of low rank.

    With ``exact=True``, for orthonormal V,

    .. math:: (V D V^\top + \lambda I)^{-1} b
              = V (D + \lambda I)^{-1} V^\top b + \lambda^{-1} (I - V V^\top) b

    (Woodbury 1950, in the form that keeps the component in the range of V accurate for small λ).
    With ``exact=False`` only the first term, :math:`V (D + \lambda I)^{-1} V^\top b` (the action on
    the dominant eigenspace, Schioppa et al. 2022); `solve` then measures the residual within the
    range of V.

    Args:
        low_rank_representation: V and D. With ``exact=True`` columns that are not orthonormal are
            orthonormalised; with ``exact=False`` they are refused, as the formula would depend on
            the factorisation.
        regularization: λ. Positive for ``exact=True``; ``None`` or >= 0 for ``exact=False``.
        exact: Which of the two.
        space: The parameters that the entries of a vector stand for, if they do.

    Raises:
        ArgumentError: `regularization` is not as said, or V is not orthonormal with
            ``exact=False``.
        SingularOperatorError: D + λI is singular to working precision.

    Example:
        >>> import torch
        >>> from hessops import LowRankOperator, LowRankProductRepresentation
        >>> representation = LowRankProductRepresentation(torch.tensor([3.0]), torch.eye(2)[:, :1])
        >>> LowRankOperator(representation, regularization=1.0).apply(torch.ones(2))
        tensor([0.2500, 1.0000])
        >>> LowRankOperator(representation, exact=False).apply(torch.ones(2))
        tensor([0.3333, 0.0000])
    """

    def __init__(
        self,
        low_rank_representation: LowRankProductRepresentation,
        regularization: float | None = None,
        exact: bool = True,
        *,
        space: ParameterSpace | None = None,
    ) -> None:
        representation = _checked_representation(low_rank_representation)
        if exact:
            if regularization is None:
                raise ArgumentError("regularization must be positive with exact=True, got None")
            checked_number(regularization, "regularization", minimum=0, exclusive=True)
        elif not representation.is_orthonormal():
            raise ArgumentError(
                "low_rank_representation must have orthonormal projections with exact=False; use "
                "low_rank_representation.orthonormalized()"
            )
        operator = LowRankProductOperator(representation, space=space)
        super().__init__(operator, regularization)
        self.exact = exact
        self.low_rank_representation = operator.low_rank_representation
        damped = _damped_eigenvalues(self.low_rank_representation, self.regularization)
        self.damped_eigenvalues = damped
        positive = None if damped.is_meta else bool((damped > 0).all())
        self._positive_semidefinite = positive

    @property
    def system(self) -> TensorOperator:
        """VDVᵀ + λI, or V(D + λI)Vᵀ with ``exact=False``."""
        if self.exact:
            return super().system
        damped = replace(self.low_rank_representation, eigen_vals=self.damped_eigenvalues)
        return LowRankProductOperator(damped, space=self.space)

    def _inverse_rows(self, rows: Tensor) -> Tensor:
        inside = self._coordinates(rows)
        result = (inside / self.damped_eigenvalues) @ self._basis.T
        if self.exact:
            result = result + self._outside(rows, inside) / self.regularization
        return result

    def _exact_eigenvalues(self) -> Tensor:
        values = 1 / self.damped_eigenvalues.double()
        outside = 1 / self.regularization if self.exact else 0.0
        return torch.cat([values, values.new_full((self.input_size - len(values),), outside)])

    def _exact_diagonal(self) -> Tensor:
        values = 1 / self.damped_eigenvalues.double()
        outside = 1 / self.regularization if self.exact else 0.0
        return self._basis.double().square() @ (values - outside) + outside

    def _reachable(self, rhs: Tensor) -> Tensor:
        return rhs if self.exact else self._coordinates(rhs) @ self._basis.T

    @property
    def _basis(self) -> Tensor:
        return self.low_rank_representation.projections

    def _coordinates(self, rows: Tensor) -> Tensor:
        return rows @ self._basis

    def _outside(self, rows: Tensor, inside: Tensor) -> Tensor:
        """The component orthogonal to V, projected twice: 1/λ would magnify what is left of V."""
        once = rows - inside @ self._basis.T
        return once - self._coordinates(once) @ self._basis.T

    def with_regularization(self, regularization: float | None) -> LowRankOperator:
        """The same eigenpairs with λ replaced."""
        return LowRankOperator(
            self.low_rank_representation, regularization, self.exact, space=self.space
        )

    def _closed_form_inverse(self, shift: float) -> TensorOperator | None:
        return super()._closed_form_inverse(shift) if self.exact else None

    def _move(self, device: torch.device) -> Self:
        moved = super()._move(device)
        moved.low_rank_representation = self.low_rank_representation.to(device)
        moved.damped_eigenvalues = self.damped_eigenvalues.to(device)
        return moved

    def _label(self) -> str:
        return (
            f"LowRankOperator(rank={self.low_rank_representation.rank}, "
            f"regularization={self.regularization:g}, exact={self.exact})"
        )


def _checked_representation(value: object) -> LowRankProductRepresentation:
    if not isinstance(value, LowRankProductRepresentation):
        raise ArgumentTypeError(
            "low_rank_representation must be a LowRankProductRepresentation, got "
            f"{type(value).__name__}"
        )
    return value


def _damped_eigenvalues(representation: LowRankProductRepresentation, shift: float) -> Tensor:
    """D + shift, refused where an entry is zero to working precision."""
    damped = representation.eigen_vals + shift
    if damped.is_meta or len(damped) == 0:
        return damped
    sizes = representation.eigen_vals.abs()
    # Against rounding in the sum D + shift; without a shift, against that in the eigenvalues.
    scales = sizes.clamp(min=abs(shift)) if shift else sizes.max().expand_as(sizes)
    if bool((damped.abs() <= torch.finfo(damped.dtype).eps * scales).any()):
        raise SingularOperatorError(
            f"D + regularization is singular to {damped.dtype} precision (smallest entry "
            f"{damped.abs().min().item():.1e}, largest {damped.abs().max().item():.1e}); use a "
            "larger regularization, or leave those eigenvalues out"
        )
    return damped
