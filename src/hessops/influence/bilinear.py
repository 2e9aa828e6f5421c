r"""Bilinear forms :math:`\langle A u, v\rangle` of operators, on tensors and on gradients."""

from __future__ import annotations

from torch import Tensor

from hessops.copies import Copyable
from hessops.errors import ArgumentTypeError, ShapeError
from hessops.influence.gradients import GradientProvider
from hessops.operators.base import TensorOperator
from hessops.operators.low_rank import LowRankOperator, LowRankProductOperator
from hessops.printed import Node, Printed
from hessops.streaming import Batch
from hessops.validation import checked_rows


class BilinearForm(Copyable, Printed):
    r"""The bilinear form :math:`(u, v) \mapsto \langle A u, v\rangle` of an operator.

    Args:
        operator: A.

    Raises:
        ArgumentTypeError: `operator` is not a `TensorOperator`.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator
        >>> from hessops.influence import BilinearForm
        >>> form = BilinearForm(DiagonalOperator(torch.tensor([1.0, 2.0])))
        >>> form.inner_prod(torch.eye(2), torch.ones(1, 2))
        tensor([[1.],
                [2.]])
    """

    def __init__(self, operator: TensorOperator) -> None:
        if not isinstance(operator, TensorOperator):
            raise ArgumentTypeError(
                f"operator must be a TensorOperator, got {type(operator).__name__}"
            )
        self.operator = operator

    def _node(self) -> Node:
        return Node(f"{type(self).__name__}()", parts=[self.operator])

    @staticmethod
    def of(operator: TensorOperator) -> BilinearForm:
        """The form that takes the least work.

        A `LowRankBilinearForm` for V D Vᵀ, as of `LowRankProductOperator` and of `LowRankOperator`
        with ``exact=False``; an inverse on the complement, too, needs gradients of one side.
        """
        if isinstance(operator, LowRankProductOperator):
            pairs = operator.low_rank_representation
            return LowRankBilinearForm(operator, pairs.projections, pairs.eigen_vals)
        if isinstance(operator, LowRankOperator) and not operator.exact:
            basis = operator.low_rank_representation.projections
            return LowRankBilinearForm(operator, basis, 1 / operator.damped_eigenvalues)
        return BilinearForm(operator)

    def inner_prod(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        r"""Entry (i, j) is :math:`\langle A u_i, v_j\rangle`.

        Args:
            left: u, ``(P,)`` or the rows of ``(m, P)``.
            right: v, ``(P,)`` or the rows of ``(n, P)``; ``None`` takes `left`.

        Returns:
            ``(m, n)``, without the dimension of what is one vector.

        Raises:
            ShapeError, DtypeError, NonFiniteError: A vector that does not fit.
        """
        right = left if right is None else right
        u, v = self._rows(left, "left"), self._rows(right, "right")
        # A is applied to the fewer vectors.
        if self.operator.symmetric and len(v) < len(u):
            product = u @ self.operator.apply(v).T
        else:
            product = self.operator.apply(u) @ v.T
        product = product if right.ndim == 2 else product[:, 0]
        return product if left.ndim == 2 else product[0]

    def grads_inner_prod(
        self, left: Batch, right: Batch | None, provider: GradientProvider
    ) -> Tensor:
        r"""Entry (i, j) is :math:`\langle A g_i, g_j\rangle` for gradients of points, ``(m, n)``.

        Only of one side gradients are made, point by point.

        Args:
            left: m points, from `GradientProvider.batch`.
            right: n points; ``None`` takes `left`.
            provider: Differentiates the losses, by the parameters that A acts on.

        Raises:
            ShapeError: `provider` differentiates by another number of parameters.
            SolverError: A is an inverse, and a solve ended without an answer.
            NonFiniteProductError: NaN or infinity in a gradient.
        """
        self._require_fitting(provider)
        other = left if right is None else right
        if self.operator.symmetric and other.size < left.size:
            return provider.products(left, self._applied(other, provider)).T
        return provider.products(other, self._applied(left, provider))

    def mixed_grads_inner_prod(
        self, left: Batch, right: Batch, provider: GradientProvider
    ) -> Tensor:
        r"""Entry (i, j) is :math:`\nabla_{x_j} \langle A g_i, g_j\rangle`.

        Args:
            left: m points, from `GradientProvider.batch`.
            right: n points, whose inputs are a floating-point tensor.
            provider: Differentiates the losses, by the parameters that A acts on.

        Returns:
            ``(m, n, *x.shape[1:])`` for the inputs x of `right`.

        Raises:
            ArgumentTypeError, DtypeError: Those inputs are not one floating-point tensor.
            ShapeError, SolverError, NonFiniteProductError: As of `grads_inner_prod`.
        """
        self._require_fitting(provider)
        return provider.mixed_products(right, self._applied(left, provider))

    def _applied(self, batch: Batch, provider: GradientProvider) -> Tensor:
        """A times the gradients of points, ``(m, P)``."""
        return self.operator.apply(provider.rows(batch))

    def _rows(self, vectors: Tensor, name: str) -> Tensor:
        operator = self.operator
        return checked_rows(vectors, operator.input_size, operator.dtype, operator.device, name)

    def _require_fitting(self, provider: GradientProvider) -> None:
        if provider.space.size != self.operator.input_size:
            raise ShapeError(
                f"provider differentiates by {provider.space.size} parameters, the operator acts "
                f"on {self.operator.input_size}"
            )


class LowRankBilinearForm(BilinearForm):
    r"""The form of :math:`A = V D V^\top`, as :math:`\langle D\, V^\top u, V^\top v\rangle`.

    :math:`V^\top g` is had for all points at once by as many Jacobian products as there are
    columns, so that no gradient of a point is ever made.

    Args:
        operator: A.
        basis: V, ``(P, r)``.
        values: The diagonal of D, ``(r,)``.

    Example:
        >>> import torch
        >>> from hessops import LowRankProductOperator, LowRankProductRepresentation
        >>> from hessops.influence import BilinearForm
        >>> pairs = LowRankProductRepresentation(torch.tensor([3.0]), torch.eye(2)[:, :1])
        >>> form = BilinearForm.of(LowRankProductOperator(pairs))
        >>> type(form).__name__, form.inner_prod(torch.ones(2), torch.ones(2))
        ('LowRankBilinearForm', tensor(3.))
    """

    def __init__(self, operator: TensorOperator, basis: Tensor, values: Tensor) -> None:
        super().__init__(operator)
        self.basis, self.values = basis, values

    def grads_inner_prod(
        self, left: Batch, right: Batch | None, provider: GradientProvider
    ) -> Tensor:
        """As of `BilinearForm`, without a gradient of a point."""
        self._require_fitting(provider)
        coordinates = provider.products(left, self.basis.T.contiguous())
        others = coordinates
        if right is not None:
            others = provider.products(right, self.basis.T.contiguous())
        return (coordinates.T * self.values) @ others

    def _applied(self, batch: Batch, provider: GradientProvider) -> Tensor:
        coordinates = provider.products(batch, self.basis.T.contiguous())
        return (coordinates.T * self.values) @ self.basis.T
