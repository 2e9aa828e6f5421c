"""Solves with an explicit Hessian."""

import torch
from dattri.func.hessian import ihvp_at_x_explicit, ihvp_explicit
from dattri.func.utils import flatten_func, flatten_params
from setting import loss, model, x, y
from torch.func import functional_call


@flatten_func(model)
def train_loss(params):
    return loss(functional_call(model, params, (x,)), y)


theta = flatten_params({name: p.detach() for name, p in model.named_parameters()})
rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)

solve = ihvp_at_x_explicit(train_loss, theta, regularization=0.05)

results = {
    "ihvp_explicit": ihvp_explicit(train_loss, regularization=0.05)((theta,), rows[0]),
    "ihvp_at_x_explicit, three rows": solve(rows),
}
