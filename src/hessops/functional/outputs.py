"""A model's outputs on a batch: linear in the parameters, and the loss as a function of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hessops.functional.products import (
    JacobianProducts,
    StackedGradient,
    differentiable,
    gradient_by_outputs,
)
from hessops.nested import differentiable_leaves, map_tensors
from hessops.objective import Objective
from hessops.streaming import Batch


class LinearizedOutputs:
    r"""One traversal of a model, at the parameters of an objective.

    Args:
        objective: A model and a loss.
        batch: n points.
        stacked_gradient: Reused between calls, it remembers whether vectorising works.

    Attributes:
        jacobian: Products with J, the Jacobian of the outputs by the parameters.
        gradients: The gradient of the mean loss by each output; that by the output of point i is
            :math:`r_i / n`, with :math:`r_i` the gradient of :math:`\ell_i`.
        apply_hessian: Products with the Hessian of the mean loss by the outputs.

    Example:
        >>> import torch
        >>> from hessops import Batch, Objective
        >>> from hessops.functional.outputs import LinearizedOutputs
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> batch = Batch.from_raw((torch.zeros(4, 3), torch.ones(4, 2)))
        >>> outputs = LinearizedOutputs(objective, batch)
        >>> pushed = outputs.jacobian.push({"bias": torch.ones(1, 2)})
        >>> [p.shape for p in pushed], outputs.along_gradients(pushed).shape
        ([torch.Size([1, 4, 2])], torch.Size([1, 4]))
    """

    def __init__(
        self, objective: Objective, batch: Batch, stacked_gradient: StackedGradient | None = None
    ) -> None:
        leaves = differentiable(objective.params)
        with torch.enable_grad():
            output = objective.output(leaves, batch.x)
        parts = differentiable_leaves(output)
        self.jacobian = JacobianProducts(parts, leaves, stacked_gradient)

        def loss_of(new: Sequence[Tensor]) -> Tensor:
            return objective.output_loss(with_parts(output, new), batch)

        self.gradients, self.apply_hessian = gradient_by_outputs(loss_of, parts)

    def along_gradients(self, pushed: Sequence[Tensor]) -> Tensor:
        r"""Entry (j, i) is :math:`\langle u_{ji}, r_i\rangle / n`, ``(k, n)``, for outputs u."""
        return along_gradients(pushed, self.gradients)


def along_gradients(pushed: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Inner products point by point, summed over the outputs, ``(k, n)``.

    Args:
        pushed: One tensor ``(k, n, ...)`` per output.
        gradients: One tensor ``(n, ...)`` per output.
    """
    terms = [
        (p.reshape(len(p), len(g), -1) * g.reshape(len(g), -1)).sum(dim=2)
        for p, g in zip(pushed, gradients, strict=True)
    ]
    return torch.stack(terms).sum(dim=0)


def with_parts(output: object, parts: Sequence[Tensor]) -> object:
    """An output with other floating-point tensors in their order."""
    remaining = iter(parts)
    return map_tensors(lambda t: next(remaining) if t.is_floating_point() else t, output)
