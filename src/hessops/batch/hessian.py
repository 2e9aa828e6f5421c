"""The Hessian of the mean loss of a batch."""

from __future__ import annotations

from hessops.batch.model import ModelBatchOperation
from hessops.functional.products import (
    LinearFunction,
    forward_over_reverse_products,
    hessian_products,
)
from hessops.streaming import Batch


class HessianBatchOperation(ModelBatchOperation):
    r"""Products with the Hessian of the mean loss of a batch.

    .. math:: H = \nabla^2_\theta\, \frac1n \sum_i \ell_i(\theta)

    by double backward (Pearlmutter 1994): one forward and backward for all vectors together, and
    one backward for each. Symmetric; its definiteness is unknown. Arguments and errors are those of
    `ModelBatchOperation`.

    Example:
        >>> import torch
        >>> from hessops import HessianBatchOperation
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> operation = HessianBatchOperation(model, torch.nn.MSELoss())
        >>> operation.apply((torch.full((4, 1), 3.0), torch.zeros(4, 1)), torch.ones(1))
        tensor([18.])
    """

    def _linearize(self, batch: Batch, *, forward_mode: bool) -> LinearFunction:
        objective = self.objective
        if forward_mode:
            return forward_over_reverse_products(
                lambda p: objective.batch_loss(p, batch), objective.params
            )
        return hessian_products(
            lambda p: objective.batch_loss(p, batch), objective.params, self._stacked_gradient
        )
