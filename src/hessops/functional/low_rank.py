"""Symmetric matrices of low rank, VDVᵀ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from hessops.errors import ArgumentTypeError, DeviceError, DtypeError, NonFiniteError, ShapeError
from hessops.printed import Node, Printed, short_dtype


class Operator(Protocol):
    """What of an operator is needed here."""

    @property
    def input_size(self) -> int:
        """P."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""

    @property
    def device(self) -> torch.device:
        """Where products are computed."""

    def apply(self, tensor: Tensor) -> Tensor:
        """Products with a vector or with rows."""

    def linearize(self) -> Operator:
        """The same operator, for many products."""


@dataclass(frozen=True, eq=False, repr=False)
class LowRankProductRepresentation(Printed):
    r"""The matrix :math:`V D V^\top` of rank at most r.

    Attributes:
        eigen_vals: The diagonal of D, shape ``(r,)``.
        projections: V, shape ``(P, r)``; the columns need not be orthonormal, see
            `orthonormalized`.
        clipped: Whether this approximates only the positive part of an indefinite matrix, as a
            sketch of one does.

    Raises:
        ShapeError: Other dimensions, or ranks that disagree.
        DtypeError: Different dtypes, or not a real floating-point one.
        DeviceError: Different devices.
        NonFiniteError: NaN or infinity.

    Example:
        >>> import torch
        >>> from hessops import LowRankProductRepresentation
        >>> rep = LowRankProductRepresentation(torch.tensor([2.0]), torch.tensor([[1.0], [1.0]]))
        >>> rep.to_dense()
        tensor([[2., 2.],
                [2., 2.]])
        >>> rep.orthonormalized().eigen_vals.round(decimals=4)
        tensor([4.])
    """

    eigen_vals: Tensor
    projections: Tensor
    clipped: bool = False

    def __post_init__(self) -> None:
        for name, tensor in (("eigen_vals", self.eigen_vals), ("projections", self.projections)):
            if not isinstance(tensor, Tensor):
                raise ArgumentTypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
            if not tensor.is_floating_point():
                raise DtypeError(f"{name} must be real floating point, got {tensor.dtype}")
            if not tensor.is_meta and not tensor.isfinite().all():
                raise NonFiniteError(f"{name} holds NaN or infinite values")
        if self.eigen_vals.ndim != 1 or self.projections.ndim != 2:
            raise ShapeError(
                f"eigen_vals must have shape (r,) and projections (P, r), got "
                f"{tuple(self.eigen_vals.shape)} and {tuple(self.projections.shape)}"
            )
        if self.projections.shape[1] != len(self.eigen_vals):
            raise ShapeError(
                f"projections has {self.projections.shape[1]} columns, "
                f"eigen_vals {len(self.eigen_vals)} entries"
            )
        if self.eigen_vals.dtype != self.projections.dtype:
            raise DtypeError(
                f"eigen_vals is {self.eigen_vals.dtype}, projections {self.projections.dtype}"
            )
        if self.eigen_vals.device != self.projections.device:
            raise DeviceError(
                f"eigen_vals is on {self.eigen_vals.device}, "
                f"projections on {self.projections.device}"
            )

    @property
    def rank(self) -> int:
        """r, the number of columns."""
        return len(self.eigen_vals)

    @property
    def device(self) -> torch.device:
        """Where both tensors live."""
        return self.projections.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of both tensors."""
        return self.projections.dtype

    def _node(self) -> Node:
        size = len(self.projections)
        clipped = ", positive part only" if self.clipped else ""
        return Node(
            f"LowRankProductRepresentation(rank={self.rank}{clipped})",
            f"{size} x {size}, {short_dtype(self.dtype)}, {self.device}",
        )

    def to(self, device: torch.device | str) -> Self:
        """The same representation on another device."""
        return replace(
            self, eigen_vals=self.eigen_vals.to(device), projections=self.projections.to(device)
        )

    def to_dense(self) -> Tensor:
        """V D Vᵀ as a ``(P, P)`` tensor."""
        return (self.projections * self.eigen_vals) @ self.projections.T

    def is_orthonormal(self) -> bool:
        """Whether VᵀV is the identity to working precision."""
        rank = self.rank
        if self.projections.is_meta:
            return True
        gram = self.projections.T @ self.projections
        identity = torch.eye(rank, dtype=self.dtype, device=self.device)
        # What orthonormalising in the same dtype leaves. It must not grow with P: Woodbury's
        # identity magnifies the error by D/λ.
        tolerance = 20 * torch.finfo(self.dtype).eps * max(rank, 1) ** 0.5
        return rank == 0 or bool((gram - identity).abs().max() <= tolerance)

    def orthonormalized(self) -> Self:
        """The same matrix with orthonormal columns, largest eigenvalues first.

        By V = QR, the eigendecomposition of R D Rᵀ gives VDVᵀ = (QU) D' (QU)ᵀ. With r > P the rank
        falls to P.
        """
        basis, triangle = torch.linalg.qr(self.projections)
        core = (triangle * self.eigen_vals) @ triangle.T
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        return replace(
            self, eigen_vals=values.flip(0), projections=(basis @ vectors).flip(1).contiguous()
        )
