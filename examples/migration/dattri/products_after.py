"""Products with the Hessian of a function, and with that of the same model over a loader."""

import torch
from setting import loader, loss, model, x, y
from torch.func import functional_call

from hessops import HessianOperator, ParameterSpace
from hessops.ihvp import hvp, hvp_at_x

space = ParameterSpace.from_model(model)


def train_loss(flat):
    return loss(functional_call(model, space.unflatten(flat), (x,)), y)


theta = space.flatten({name: p.detach() for name, p in model.named_parameters()})
rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)


def weighted(weights, t):
    return (weights * t**3).sum()


weights, t = torch.arange(1.0, 4.0), torch.ones(3)
last = hvp(weighted, argnums=-1, mode="rev-fwd")

results = {
    "hvp": hvp(train_loss)((theta,), rows[0]),
    "hvp, forward mode": hvp(train_loss, mode="rev-fwd")((theta,), rows[0]),
    "hvp_at_x, with λ": hvp_at_x(train_loss, (theta,), regularization=0.1)(rows[0]),
    # The same matrix, batch by batch.
    "three rows": HessianOperator(model, loss, loader).apply(rows),
    "by the second argument": hvp(weighted, argnums=1)((weights, t), torch.ones(3)),
    "argnums=-1, forward mode": last((weights, t), torch.ones(3)),
}
differs = {
    "argnums=-1, forward mode": "dattri compares -1 with the positions 0, 1, ..., finds none, and "
    "differentiates along zero",
}
