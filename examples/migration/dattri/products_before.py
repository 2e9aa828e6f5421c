"""Products with the Hessian of a function."""

import torch
from dattri.func.hessian import hvp, hvp_at_x
from dattri.func.utils import flatten_func, flatten_params
from setting import loss, model, x, y
from torch.func import functional_call, vmap


@flatten_func(model)
def train_loss(params):
    return loss(functional_call(model, params, (x,)), y)


theta = flatten_params({name: p.detach() for name, p in model.named_parameters()})
rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)


def weighted(weights, t):
    return (weights * t**3).sum()


weights, t = torch.arange(1.0, 4.0), torch.ones(3)
last = hvp(weighted, argnums=-1, mode="rev-fwd")

results = {
    "hvp": hvp(train_loss)((theta,), rows[0]),
    "hvp, forward mode": hvp(train_loss, mode="rev-fwd")((theta,), rows[0]),
    "hvp_at_x, with λ": hvp_at_x(train_loss, (theta,), regularization=0.1)(rows[0]),
    "three rows": vmap(hvp_at_x(train_loss, (theta,)))(rows),
    "by the second argument": hvp(weighted, argnums=1)((weights, t), torch.ones(3)),
    "argnums=-1, forward mode": last((weights, t), torch.ones(3)),
}
