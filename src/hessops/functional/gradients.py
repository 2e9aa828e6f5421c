"""Per-sample gradients of an objective."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import grad

from hessops.functional.products import Stack, differentiable
from hessops.objective import Objective
from hessops.point_loss import map_points
from hessops.streaming import Batch


def per_sample_gradients(
    objective: Objective, params: Mapping[str, Tensor], batch: Batch, *, vectorize: bool = True
) -> Stack:
    r"""The gradients :math:`g_i = \nabla\ell_i(\theta)` of every point alone.

    Args:
        objective: Model and loss.
        params: Where to take the gradients, ``{name: tensor}``.
        batch: n points.
        vectorize: Uses `torch.func.vmap`, which some models refuse; without it, one backward pass
            per point.

    Returns:
        ``{name: (n, *shape)}``: n·P numbers; callers bound n.

    Example:
        >>> import torch
        >>> from hessops import Batch, Objective
        >>> from hessops.functional import per_sample_gradients
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> batch = Batch.from_raw((torch.zeros(4, 3), torch.ones(4, 2)))
        >>> per_sample_gradients(objective, objective.params, batch)["weight"].shape
        torch.Size([4, 2, 3])
    """
    if vectorize:

        def gradient_of_row(point: Batch) -> Stack:
            gradients: Stack = grad(lambda p: objective.batch_loss(p, point))(dict(params))
            return gradients

        return map_points(gradient_of_row, batch)
    points = [batch.rows(slice(i, i + 1), 1) for i in range(batch.size)]
    gradients = [mean_gradient(objective, params, point) for point in points]
    return {name: torch.stack([g[name] for g in gradients]) for name in params}


def mean_gradient(
    objective: Objective, params: Mapping[str, Tensor], batch: Batch
) -> dict[str, Tensor]:
    """The gradient of the mean loss over the batch, by one backward pass.

    Args:
        objective: Model and loss.
        params: Where to take the gradient, ``{name: tensor}``.
        batch: n points.

    Returns:
        ``{name: shape}``, without a graph.

    Example:
        >>> import torch
        >>> from hessops import Batch, Objective
        >>> from hessops.functional import mean_gradient
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> batch = Batch.from_raw((torch.zeros(4, 3), torch.ones(4, 2)))
        >>> mean_gradient(objective, objective.params, batch)["weight"].shape
        torch.Size([2, 3])
    """
    leaves = differentiable(params)
    with torch.enable_grad():
        value = objective.batch_loss(leaves, batch)
    if not value.requires_grad:
        return {name: torch.zeros_like(p) for name, p in leaves.items()}
    gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(leaves.items(), gradients, strict=True)
    }
