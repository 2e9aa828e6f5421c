"""Approximate inverses from a Krylov space."""

import torch
from dattri.func.hessian import ihvp_at_x_arnoldi
from dattri.func.utils import flatten_func, flatten_params
from setting import loss, model, x, y
from torch.func import functional_call


@flatten_func(model)
def train_loss(params):
    return loss(functional_call(model, params, (x,)), y)


theta = flatten_params({name: p.detach() for name, p in model.named_parameters()})
rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)

# Its starting vector and its Hessenberg matrix are of the default dtype.
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
top = ihvp_at_x_arnoldi(train_loss, theta, max_iter=101, top_k=20, regularization=0.05)
# 335 is one more than there are parameters: one step less is made than `max_iter` says.
every = ihvp_at_x_arnoldi(train_loss, theta, max_iter=335, top_k=334, regularization=0.05)

results = {
    "20 eigenpairs, three rows": top(rows),
    "all eigenpairs: the inverse": every(rows[0])[0],
}
