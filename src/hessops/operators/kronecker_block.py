"""The Kronecker-factored block of a layer, by its eigen-decomposition."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from hessops.errors import ShapeError, StructureError
from hessops.functional.layers import MatrixForm
from hessops.operators.eigen import EigenOperator
from hessops.validation import checked_regularization


class KroneckerOperator(EigenOperator):
    r"""An operator on the parameters of a layer in a Kronecker eigenbasis.

    .. math:: v \mapsto \mathrm{vec}\bigl(Q_B\, (\Lambda \odot Q_B^\top M Q_A)\, Q_A^\top\bigr)

    for M the parameters as a matrix. With :math:`\Lambda_{jk} = \lambda_{B,j} \lambda_{A,k}` it is
    the matrix :math:`B \otimes A` of KFAC (Martens & Grosse 2015); with any other Λ, EKFAC (George
    et al. 2018).

    Args:
        form: How the parameters are a matrix, or one for each group.
        eigenvalues: Λ, ``(groups, outputs, inputs)``.
        output_basis: :math:`Q_B`, ``(groups, outputs, outputs)``.
        input_basis: :math:`Q_A`, ``(groups, inputs, inputs)``; ``None`` is the identity.
        label: How it is called in the printed tree.
        factor_eigenvalues: :math:`\lambda_B` ``(groups, outputs)`` and :math:`\lambda_A`
            ``(groups, inputs)``, where Λ is their product.

    Raises:
        ShapeError: They do not fit.

    Example:
        >>> import torch
        >>> from hessops import ParameterSpace
        >>> from hessops.functional.layers import MatrixForm
        >>> from hessops.operators.kronecker_block import KroneckerOperator
        >>> space = ParameterSpace.from_tensors({"weight": torch.zeros(1, 2)})
        >>> form = MatrixForm(space, "weight")
        >>> A = KroneckerOperator(
        ...     form, torch.tensor([[[1.0, 4.0]]]), torch.ones(1, 1, 1), torch.eye(2)[None]
        ... )
        >>> A.apply_to_dict({"weight": torch.ones(1, 2)})
        {'weight': tensor([[1., 4.]])}
    """

    def __init__(
        self,
        form: MatrixForm,
        eigenvalues: Tensor,
        output_basis: Tensor,
        input_basis: Tensor | None,
        *,
        label: str = "KroneckerOperator",
        factor_eigenvalues: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        groups, outputs, inputs = form.shape
        expected = {
            "eigenvalues": (groups, outputs, inputs),
            "output_basis": (groups, outputs, outputs),
        }
        given = {"eigenvalues": eigenvalues, "output_basis": output_basis}
        if input_basis is not None:
            expected["input_basis"] = (groups, inputs, inputs)
            given["input_basis"] = input_basis
        for name, tensor in given.items():
            if tuple(tensor.shape) != expected[name]:
                raise ShapeError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {expected[name]}"
                )
        super().__init__(eigenvalues.reshape(-1), space=form.space)
        self.form = form
        self.output_basis = output_basis.detach()
        self.input_basis = None if input_basis is None else input_basis.detach()
        self.factor_eigenvalues = factor_eigenvalues
        self.label = label

    def _into_basis(self, rows: Tensor) -> Tensor:
        matrices = self.output_basis.mT @ self.form.matrices(rows)
        if self.input_basis is not None:
            matrices = matrices @ self.input_basis
        return matrices.flatten(1)

    def _out_of_basis(self, rows: Tensor) -> Tensor:
        matrices = self.output_basis @ rows.reshape(len(rows), *self.form.shape)
        if self.input_basis is not None:
            matrices = matrices @ self.input_basis.mT
        return self.form.rows(matrices)

    def _exact_diagonal(self) -> Tensor:
        """The squares of both bases, around the eigenvalues."""
        matrices = self.eigenvalues.double().reshape(1, *self.form.shape)
        matrices = self.output_basis.double().square() @ matrices
        if self.input_basis is not None:
            matrices = matrices @ self.input_basis.double().square().mT
        return self.form.rows(matrices)[0]

    def _with_eigenvalues(self, eigenvalues: Tensor) -> EigenOperator:
        changed = super()._with_eigenvalues(eigenvalues)
        assert isinstance(changed, KroneckerOperator)
        changed.factor_eigenvalues = None
        return changed

    def factored_tikhonov(self, regularization: float) -> EigenOperator:
        r""":math:`(B + \tfrac{\sqrt\lambda}{\pi} I) \otimes (A + \pi \sqrt\lambda I)`.

        With :math:`\pi^2` the ratio of the mean eigenvalues of A and B (Martens & Grosse 2015,
        Section 6.3), by group.

        Args:
            regularization: λ >= 0.

        Raises:
            StructureError: Λ is no product.
        """
        if self.factor_eigenvalues is None:
            raise StructureError("the eigenvalues are no products of those of two factors")
        of_outputs, of_inputs = self.factor_eigenvalues
        means = [values.mean(dim=1, keepdim=True) for values in (of_inputs, of_outputs)]
        positive = (means[0] > 0) & (means[1] > 0)
        ratio = torch.where(positive, means[0] / means[1].where(positive, 1.0), 1.0).sqrt()
        root = checked_regularization(regularization) ** 0.5
        outputs, inputs = of_outputs + root / ratio, of_inputs + root * ratio
        return self._with_eigenvalues((outputs.unsqueeze(2) * inputs.unsqueeze(1)).reshape(-1))

    @property
    def _decomposed_size(self) -> int:
        _, outputs, inputs = self.form.shape
        return outputs if self.input_basis is None else max(outputs, inputs)

    def _move(self, device: torch.device) -> Self:
        moved = self._copy_on(device)
        moved.form = self.form.to(device)
        moved.output_basis = self.output_basis.to(device)
        moved.input_basis = None if self.input_basis is None else self.input_basis.to(device)
        if self.factor_eigenvalues is not None:
            first, second = self.factor_eigenvalues
            moved.factor_eigenvalues = first.to(device), second.to(device)
        moved._hold(self.eigenvalues.to(device))
        return moved

    def _label(self) -> str:
        return self.label
