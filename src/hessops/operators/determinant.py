"""Log-determinants from eigenvalues that are known up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from hessops.errors import SingularOperatorError, StructureError


def sum_of_logarithms(eigenvalues: Tensor, rounding: Tensor | float, name: str) -> float:
    """log det of a matrix with these eigenvalues.

    Args:
        eigenvalues: ``(n,)`` float64.
        rounding: Up to what size each counts as zero.
        name: Begins the messages.

    Raises:
        StructureError: One is negative.
        SingularOperatorError: One counts as zero.

    Example:
        >>> import torch
        >>> from hessops.operators.determinant import sum_of_logarithms
        >>> sum_of_logarithms(torch.ones(3, dtype=torch.float64), 0.0, "the identity")
        0.0
    """
    if bool((eigenvalues < -rounding).any()):
        raise not_positive_definite(name, eigenvalues.min().item())
    is_zero = eigenvalues <= rounding
    if bool(is_zero.any()):
        raise SingularOperatorError(
            f"{name}: {int(is_zero.sum())} of {len(eigenvalues)} eigenvalues are zero to working "
            "precision, so that the determinant is zero; shift the operator: A.shift(c), c > 0"
        )
    return eigenvalues.log().sum().item()


def rounding_of_sum(scaled: Tensor, shift: float, dtype: torch.dtype) -> Tensor:
    """The rounding error of scaled + shift, entry by entry."""
    return torch.finfo(dtype).eps * scaled.abs().clamp(min=abs(shift))


def not_positive_definite(name: str, smallest: float) -> StructureError:
    """The error for an operator without a real log-determinant."""
    return StructureError(
        f"{name}: the matrix is not positive definite, its smallest eigenvalue is {smallest:.3e} "
        f"or less; shift it by more than {abs(smallest):.1e}, or take a Gauss-Newton matrix"
    )
