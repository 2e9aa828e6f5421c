"""Influences by KFAC and EKFAC, with hessops."""

import torch
from setting import loader, model, x, x_test, y, y_test

from hessops.influence import EkfacInfluence

kfac = EkfacInfluence(model, hessian_regularization=0.1).fit(loader)
ekfac = EkfacInfluence(model, update_diagonal=True, hessian_regularization=0.1).fit(loader)
by_layer = ekfac.influences_by_layer(x_test, y_test, x, y)

gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]

results = {
    "KFAC": kfac.influences(x_test, y_test, x, y),
    "EKFAC": ekfac.influences(x_test, y_test, x, y),
    "EKFAC, layer 2": by_layer["2"],
    "norm of model.grad": torch.stack([gradient.norm() for gradient in gradients]),
}
FISHER = "the output gradients of pyDVL are one vector a point, whose square is no Fisher matrix"
differs = {
    "KFAC": FISHER,
    "EKFAC": FISHER,
    "EKFAC, layer 2": FISHER,
    "norm of model.grad": "`fit` of pyDVL leaves its backward passes in the user's `.grad`",
}
