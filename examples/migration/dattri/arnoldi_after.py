"""Approximate inverses from a Krylov space."""

import torch
from setting import loss, model, x, y
from torch.func import functional_call

from hessops import ParameterSpace
from hessops.ihvp import ihvp_at_x_arnoldi

space = ParameterSpace.from_model(model)


def train_loss(flat):
    return loss(functional_call(model, space.unflatten(flat), (x,)), y)


theta = space.flatten({name: p.detach() for name, p in model.named_parameters()})
rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)

torch.manual_seed(0)
top = ihvp_at_x_arnoldi(train_loss, theta, max_iter=100, top_k=20, regularization=0.05)
every = ihvp_at_x_arnoldi(train_loss, theta, max_iter=334, top_k=334, regularization=0.05)

results = {
    "20 eigenpairs, three rows": top(rows),
    "all eigenpairs: the inverse": every(rows[0]),
}
differs = {
    "all eigenpairs: the inverse": "dattri does not orthogonalise its basis a second time; it is "
    "lost after some 40 steps, Ritz values of 1e-18 appear, and are divided by",
}
