"""Solves by LiSSA, with all points in each of the updates."""

import torch
from dattri.func.hessian import ihvp_at_x_lissa, ihvp_lissa
from dattri.func.utils import flatten_func, flatten_params
from setting import loss, model, x, y
from torch.func import functional_call


@flatten_func(model)
def train_loss(params, inputs, targets):
    return loss(functional_call(model, params, (inputs,)), targets.long())


theta = flatten_params({name: p.detach() for name, p in model.named_parameters()})
rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)
# Arguments must be of floating point, and in_dims must say that theta has no points.
data, in_dims = (theta, x, y.double()), (None, 0, 0)
settings = {"batch_size": 250, "recursion_depth": 40, "damping": 0.02, "scaling": 5.0}
torch.manual_seed(0)

results = {
    "ihvp_lissa": ihvp_lissa(train_loss, **settings)(data, rows[0], in_dims)[0],
    "ihvp_at_x_lissa": ihvp_at_x_lissa(train_loss, *data, in_dims=in_dims, **settings)(rows[0])[0],
}
