"""The empirical and the generalized Gauss-Newton matrix of a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from hessops.batch.model import ModelBatchOperation
from hessops.functional.outputs import LinearizedOutputs, along_gradients
from hessops.functional.products import LinearFunction, forward_mode_products
from hessops.nested import differentiable_leaves
from hessops.streaming import Batch

OutputMap = Callable[[Sequence[Tensor]], list[Tensor]]


class _OutputSpaceOperation(ModelBatchOperation):
    r"""A matrix :math:`J^\top M J` with J the Jacobian of the model's outputs by the parameters.

    A product is one :math:`J v`, one M on the outputs and one :math:`J^\top u`; nothing of size
    n·P is ever made.
    """

    @abstractmethod
    def _output_map(
        self, gradients: list[Tensor], apply_hessian: OutputMap, size: int
    ) -> OutputMap:
        """M, from the gradient and the Hessian of the batch's mean loss by the outputs."""

    def _linearize(self, batch: Batch, *, forward_mode: bool) -> LinearFunction:
        objective = self.objective
        outputs = LinearizedOutputs(objective, batch, self._stacked_gradient)
        output_map = self._output_map(outputs.gradients, outputs.apply_hessian, batch.size)
        push = (
            forward_mode_products(
                lambda p: differentiable_leaves(objective.output(p, batch.x)), objective.params
            )
            if forward_mode
            else outputs.jacobian.push
        )
        return lambda stack: outputs.jacobian.pull(output_map(push(stack)))


class GaussNewtonBatchOperation(_OutputSpaceOperation):
    r"""Products with the empirical Gauss-Newton matrix of a batch.

    .. math:: G = \frac1n \sum_i g_i g_i^\top, \qquad g_i = \nabla_\theta \ell_i(\theta)

    also called the empirical Fisher matrix (Martens 2020, Section 11). With :math:`r_i` the
    gradient of :math:`\ell_i` by the output of point i, :math:`g_i = J_i^\top r_i`, so that a
    product needs one :math:`J v` and one :math:`J^\top u` and no per-sample gradient. Symmetric
    positive semi-definite. Arguments and errors are those of `ModelBatchOperation`.

    Example:
        >>> import torch
        >>> from hessops import GaussNewtonBatchOperation
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> operation = GaussNewtonBatchOperation(model, torch.nn.MSELoss())
        >>> x = torch.tensor([[1.0], [2.0]])  # gradients 2 x_i^2 w = 2 and 8
        >>> operation.apply((x, torch.zeros(2, 1)), torch.ones(1))
        tensor([34.])
    """

    always_positive_semidefinite = True

    def _output_map(
        self, gradients: list[Tensor], apply_hessian: OutputMap, size: int
    ) -> OutputMap:
        # The mean loss has r_i / n as its gradient by output i, hence the factor n.
        rows = [g.reshape(size, -1) for g in gradients]

        def apply(pushed: Sequence[Tensor]) -> list[Tensor]:
            along = along_gradients(pushed, gradients)
            return [
                (size * along.unsqueeze(2) * r).reshape(p.shape)
                for p, r in zip(pushed, rows, strict=True)
            ]

        return apply


class GeneralizedGaussNewtonBatchOperation(_OutputSpaceOperation):
    r"""Products with the generalized Gauss-Newton matrix of a batch.

    .. math:: \frac1n \sum_i J_i^\top H_i J_i

    with :math:`J_i` the Jacobian of the output of point i by the parameters and :math:`H_i` the
    Hessian of :math:`\ell_i` by that output (Schraudolph 2002). Symmetric; positive semi-definite
    when the loss is convex in the output, which is not known of an arbitrary loss. Arguments and
    errors are those of `ModelBatchOperation`.

    Example:
        >>> import torch
        >>> from hessops import GeneralizedGaussNewtonBatchOperation
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> operation = GeneralizedGaussNewtonBatchOperation(model, torch.nn.MSELoss())
        >>> operation.apply((torch.full((4, 1), 3.0), torch.zeros(4, 1)), torch.ones(1))
        tensor([18.])
    """

    def _output_map(
        self, gradients: list[Tensor], apply_hessian: OutputMap, size: int
    ) -> OutputMap:
        return apply_hessian
