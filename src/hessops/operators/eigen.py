"""Operators with a known eigen-decomposition, whose functions are all at hand."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from hessops.errors import ShapeError, SingularOperatorError, StructureError
from hessops.isolation import isolated
from hessops.operators.base import TensorOperator
from hessops.space import ParameterSpace
from hessops.validation import (
    checked_floating,
    checked_number,
    checked_regularization,
    checked_rows,
)

# Without a regularization, eigenvalues below this multiple of n·ε of the largest count as zero.
CUTOFF_FACTOR = 10


class EigenOperator(TensorOperator):
    r"""A symmetric operator :math:`Q\, \mathrm{diag}(d)\, Q^\top` whose Q is known by its products.

    Q is orthogonal. Inverse, square root, trace and log-determinant are closed forms; `mapped`
    gives any other function of the operator, which shares Q.

    A subclass defines ``_into_basis(rows)``, the rows times Q, ``_out_of_basis(rows)``, the rows
    times :math:`Q^\top`, and ``_move``.

    Args:
        eigenvalues: d, ``(n,)``, in the order of the columns of Q.
        space: The parameters that the entries of a vector stand for, if they do.

    Raises:
        ArgumentTypeError, ShapeError, DtypeError, NonFiniteError: `eigenvalues` is something else.

    Example:
        >>> import torch
        >>> from hessops import KfacOperator
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> K = KfacOperator(model, torch.nn.MSELoss(), [(x, torch.zeros(2, 1))])
        >>> K.eigenvalues, round(K.trace(), 4)
        (tensor([1.0000, 4.0000]), 5.0)
        >>> K.power(0.5).apply(torch.ones(2)).round(decimals=4)
        tensor([1., 2.])
        >>> v = torch.ones(2)
        >>> bool((K.to_eigenbasis(K.apply(v)) - K.eigenvalues * K.to_eigenbasis(v)).norm() < 1e-5)
        True
    """

    def __init__(self, eigenvalues: Tensor, *, space: ParameterSpace | None = None) -> None:
        checked_floating(eigenvalues, "eigenvalues", ndim=1)
        # By name, as a subclass may also be an operator on dictionaries, made of its space alone.
        TensorOperator.__init__(
            self,
            len(eigenvalues),
            eigenvalues.dtype,
            eigenvalues.device,
            symmetric=True,
            space=space,
        )
        self._hold(eigenvalues.detach())

    def _hold(self, eigenvalues: Tensor) -> None:
        self._eigenvalues = eigenvalues
        if not eigenvalues.is_meta:
            self._positive_semidefinite = bool((eigenvalues >= 0).all())

    @abstractmethod
    def _into_basis(self, rows: Tensor) -> Tensor:
        """The hook for the rows of a ``(k, n)`` stack times Q."""

    @abstractmethod
    def _out_of_basis(self, rows: Tensor) -> Tensor:
        """The hook for the rows of a ``(k, n)`` stack times Qᵀ."""

    @property
    def eigenvalues(self) -> Tensor:
        """d, ``(n,)``, in the order of the columns of Q."""
        return self._eigenvalues

    def to_eigenbasis(self, tensor: Tensor) -> Tensor:
        r""":math:`Q^\top v` for a vector ``(n,)``, or for every row of a ``(k, n)`` stack.

        Raises:
            ShapeError, DtypeError, NonFiniteError: `tensor` does not fit.
        """
        return self._turned(tensor, self._into_basis)

    def from_eigenbasis(self, tensor: Tensor) -> Tensor:
        """Q v, the inverse of `to_eigenbasis`.

        Raises:
            ShapeError, DtypeError, NonFiniteError: `tensor` does not fit.
        """
        return self._turned(tensor, self._out_of_basis)

    def _turned(self, tensor: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
        with isolated(self.device):
            rows = checked_rows(tensor, self.input_size, self.dtype, self.device)
            turned = turn(rows)
        return turned if tensor.ndim == 2 else turned[0]

    def mapped(self, eigenvalues: Tensor) -> EigenOperator:
        """The operator with the same Q and other eigenvalues.

        Args:
            eigenvalues: ``(n,)``, of the dtype and on the device of the operator.

        Raises:
            ShapeError, DtypeError, NonFiniteError: They do not fit.
        """
        checked_floating(eigenvalues, "eigenvalues", ndim=1)
        if eigenvalues.shape != self._eigenvalues.shape:
            raise ShapeError(
                f"eigenvalues has shape {tuple(eigenvalues.shape)}, expected ({self.input_size},)"
            )
        return self._with_eigenvalues(eigenvalues.to(self.device, self.dtype))

    def _with_eigenvalues(self, eigenvalues: Tensor) -> EigenOperator:
        changed = copy.copy(self)
        changed._hold(eigenvalues)
        return changed

    def damped(self, regularization: float) -> EigenOperator:
        """A + λI, with its eigen-decomposition; `shift` gives the same map without."""
        return self._with_eigenvalues(self.eigenvalues + checked_regularization(regularization))

    def power(self, exponent: float) -> EigenOperator:
        r""":math:`A^p`, of a positive semi-definite operator.

        With p = 1/2 the symmetric square root; ``A.damped(λ).power(-0.5)`` maps standard normal
        vectors to samples of :math:`N(0, (A + \lambda I)^{-1})`.

        Args:
            exponent: p.

        Raises:
            StructureError: A has negative eigenvalues.
            SingularOperatorError: p is negative and A is singular to working precision.
        """
        exponent = checked_number(exponent, "exponent")
        if self.positive_semidefinite is False:
            raise StructureError(
                f"{type(self).__name__} has negative eigenvalues (the smallest is "
                f"{self.eigenvalues.min().item():.3e}), whose powers are not real"
            )
        if exponent < 0:
            self._require_regular(self.eigenvalues, 0.0)
        return self._with_eigenvalues(self.eigenvalues**exponent)

    def trace(self) -> float:
        r""":math:`\mathrm{tr}\, A`."""
        return self.eigenvalues.double().sum().item()

    def _exact_eigenvalues(self) -> Tensor:
        return self.eigenvalues.double()

    def logdet(self, regularization: float = 0.0) -> float:
        r""":math:`\log\det(A + \lambda I)`.

        Args:
            regularization: λ >= 0.

        Raises:
            SingularOperatorError: A + λI is singular to working precision.
            StructureError: It has negative eigenvalues.
        """
        return self._logdet(checked_regularization(regularization))

    def _logdet(self, shift: float) -> float:
        """log det(A + shift·I)."""
        shifted = self.eigenvalues.double() + shift
        if bool((shifted < 0).any()):
            raise StructureError(
                f"{type(self).__name__} + {shift:g} I has negative eigenvalues (the smallest is "
                f"{shifted.min().item():.3e}), and no real log-determinant"
            )
        self._require_regular(shifted, shift)
        return shifted.log().sum().item()

    def _exact_logdet(self, scale: float, shift: float) -> float | None:
        if self.eigenvalues.is_meta:
            return None
        scaled = self if scale == 1 else self._with_eigenvalues(scale * self.eigenvalues)
        return scaled._logdet(shift)

    def pseudo_inverse(self, cutoff: float | None = None) -> EigenOperator:
        r"""The Moore-Penrose inverse, where eigenvalues that are rounding count as zero.

        Args:
            cutoff: Eigenvalues of at most this size count as zero; ``None`` is the
                property `cutoff`: 10·m·ε of the largest eigenvalue of the block, with ε the
                precision of the dtype and m the size of the largest matrix that was decomposed.

        Raises:
            ArgumentError: `cutoff` is negative.
        """
        bound = self.cutoff if cutoff is None else checked_number(cutoff, "cutoff", minimum=0)
        values = self.eigenvalues
        kept = values.abs() > bound
        return self._with_eigenvalues(torch.where(kept, 1 / values.where(kept, 1.0), 0.0))

    @property
    def cutoff(self) -> Tensor:
        """The size up to which eigenvalues are taken for rounding, ``()`` or one for each."""
        precision = CUTOFF_FACTOR * self._decomposed_size * torch.finfo(self.dtype).eps
        return precision * self.eigenvalues.abs().max()

    @property
    def _decomposed_size(self) -> int:
        """The hook for the size of the largest matrix whose eigenvectors were computed."""
        return self.input_size

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return self._out_of_basis(self._into_basis(rows) * self.eigenvalues)

    def _closed_form_inverse(self, shift: float) -> EigenOperator:
        return self._inverted(shift)

    def _inverted(self, shift: float | Tensor) -> EigenOperator:
        """(A + shift·I)⁻¹, or with a shift ``(n,)`` of every eigenvalue."""
        shifted = self.eigenvalues + shift
        self._require_regular(shifted, shift)
        return self._with_eigenvalues(1 / shifted)

    def _require_regular(self, shifted: Tensor, shift: float | Tensor) -> None:
        """Raises where a shifted eigenvalue is zero to working precision.

        Raises:
            SingularOperatorError: That.
        """
        if shifted.is_meta:
            return
        sizes = torch.as_tensor(shift, dtype=self.dtype, device=self.device).abs()
        # Without a shift, against rounding in the decomposition; with one, against that in the sum.
        of_sum = torch.finfo(self.dtype).eps * torch.maximum(self.eigenvalues.abs(), sizes)
        bounds = torch.where(sizes == 0, self.cutoff, of_sum)
        singular = shifted.abs() <= bounds
        if bool(singular.any()):
            raise SingularOperatorError(
                f"{type(self).__name__} is singular to {self.dtype} precision: "
                f"{int(singular.sum())} of its {self.input_size} eigenvalues count as zero (the "
                f"largest is {shifted.abs().max().item():.1e}); pass a positive regularization, "
                "shift it, or use pseudo_inverse()"
            )


class DiagonalEigenOperator(EigenOperator):
    """A diagonal operator: Q = I.

    Args:
        eigenvalues: The diagonal, ``(n,)``.
        space: The parameters that the entries stand for, if they do.
        label: How it is called in the printed tree.

    Example:
        >>> import torch
        >>> from hessops.operators.eigen import DiagonalEigenOperator
        >>> DiagonalEigenOperator(torch.tensor([1.0, 4.0])).power(-0.5).apply(torch.ones(2))
        tensor([1.0000, 0.5000])
    """

    def __init__(
        self,
        eigenvalues: Tensor,
        *,
        space: ParameterSpace | None = None,
        label: str = "DiagonalEigenOperator",
    ) -> None:
        super().__init__(eigenvalues, space=space)
        self.label = label

    def _into_basis(self, rows: Tensor) -> Tensor:
        return rows

    def _out_of_basis(self, rows: Tensor) -> Tensor:
        return rows

    def _exact_diagonal(self) -> Tensor:
        return self.eigenvalues.double()

    @property
    def _decomposed_size(self) -> int:
        return 1

    def _move(self, device: torch.device) -> Self:
        moved = self._copy_on(device)
        moved._hold(self.eigenvalues.to(device))
        return moved

    def _label(self) -> str:
        return self.label


class DenseEigenOperator(EigenOperator):
    """A symmetric matrix, by its eigenvectors.

    Args:
        eigenvalues: d, ``(n,)``.
        basis: Q, ``(n, n)``, with the eigenvectors as columns.
        space: The parameters that the entries stand for, if they do.
        label: How it is called in the printed tree.

    Raises:
        ShapeError: `basis` does not fit.

    Example:
        >>> import torch
        >>> from hessops.operators.eigen import DenseEigenOperator
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> DenseEigenOperator(*torch.linalg.eigh(A)).apply(torch.tensor([1.0, 0.0]))
        tensor([2.0000, 1.0000])
    """

    def __init__(
        self,
        eigenvalues: Tensor,
        basis: Tensor,
        *,
        space: ParameterSpace | None = None,
        label: str = "DenseEigenOperator",
    ) -> None:
        super().__init__(eigenvalues, space=space)
        checked_floating(basis, "basis", ndim=2)
        if tuple(basis.shape) != self.shape:
            raise ShapeError(f"basis has shape {tuple(basis.shape)}, expected {self.shape}")
        self.basis = basis.detach()
        self.label = label

    def _into_basis(self, rows: Tensor) -> Tensor:
        return rows @ self.basis

    def _out_of_basis(self, rows: Tensor) -> Tensor:
        return rows @ self.basis.T

    def _exact_diagonal(self) -> Tensor:
        return self.basis.double().square() @ self.eigenvalues.double()

    def _move(self, device: torch.device) -> Self:
        moved = self._copy_on(device)
        moved._hold(self.eigenvalues.to(device))
        moved.basis = self.basis.to(device)
        return moved

    def _label(self) -> str:
        return self.label
