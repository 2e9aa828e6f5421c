"""Solves by conjugate gradients."""

import torch
from dattri.func.hessian import ihvp_at_x_cg, ihvp_cg
from dattri.func.utils import flatten_func, flatten_params
from setting import loss, model, x, y
from torch.func import functional_call


@flatten_func(model)
def train_loss(params):
    return loss(functional_call(model, params, (x,)), y)


theta = flatten_params({name: p.detach() for name, p in model.named_parameters()})
rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)

solve = ihvp_at_x_cg(train_loss, theta, max_iter=60, regularization=0.05)


def quadratic(t):
    return 1.5 * (t**2).sum()


of_quadratic = ihvp_at_x_cg(quadratic, torch.ones(2))  # one step is enough; ten are allowed

results = {
    "ihvp_cg": ihvp_cg(train_loss, max_iter=60, regularization=0.05)((theta,), rows[0])[0],
    "ihvp_at_x_cg, three rows": solve(rows),
    "a function that needs one step": of_quadratic(torch.tensor([3.0, 6.0]))[0],
    "a right-hand side of zero": solve(torch.zeros_like(theta))[0],
}
