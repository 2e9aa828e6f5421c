"""Solves by LiSSA, with all points in each of the updates."""

import torch
from setting import loss, model, x, y
from torch.func import functional_call

from hessops import ParameterSpace
from hessops.ihvp import ihvp_at_x_lissa, ihvp_lissa

space = ParameterSpace.from_model(model)


def train_loss(flat, inputs, targets):
    return loss(functional_call(model, space.unflatten(flat), (inputs,)), targets)


theta = space.flatten({name: p.detach() for name, p in model.named_parameters()})
rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)
data = (theta, x, y)
settings = {"batch_size": 250, "recursion_depth": 40, "damping": 0.02, "scaling": 5.0}

results = {
    "ihvp_lissa": ihvp_lissa(train_loss, **settings)(data, rows[0]),
    "ihvp_at_x_lissa": ihvp_at_x_lissa(train_loss, *data, **settings)(rows[0]),
}
differs = {
    "ihvp_at_x_lissa": "dattri hands batch_size and num_repeat on in the wrong order: here 250 "
    "chains with one point for an update",
}
