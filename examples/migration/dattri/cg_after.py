"""Solves by conjugate gradients."""

import torch
from setting import loss, model, x, y
from torch.func import functional_call

from hessops import ParameterSpace
from hessops.ihvp import ihvp_at_x_cg, ihvp_cg

space = ParameterSpace.from_model(model)


def train_loss(flat):
    return loss(functional_call(model, space.unflatten(flat), (x,)), y)


theta = space.flatten({name: p.detach() for name, p in model.named_parameters()})
rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)

solve = ihvp_at_x_cg(train_loss, theta, max_iter=60, tol=1e-10, regularization=0.05)


def quadratic(t):
    return 1.5 * (t**2).sum()


of_quadratic = ihvp_at_x_cg(quadratic, torch.ones(2))  # one step is enough; ten are allowed

of_one = ihvp_cg(train_loss, max_iter=60, tol=1e-10, regularization=0.05)

results = {
    "ihvp_cg": of_one((theta,), rows[0]),
    "ihvp_at_x_cg, three rows": solve(rows),
    "a function that needs one step": of_quadratic(torch.tensor([3.0, 6.0])),
    "a right-hand side of zero": solve(torch.zeros_like(theta)),
}
_goes_on = "dattri goes on after the residual has become zero, and divides zero by zero: NaN"
differs = {"a function that needs one step": _goes_on, "a right-hand side of zero": _goes_on}
