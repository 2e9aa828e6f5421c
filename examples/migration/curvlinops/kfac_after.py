"""KFAC and EKFAC, their inverses, and a layer that is called twice."""

import torch
from setting import loader, loss, model, x
from torch import nn

from hessops import EkfacOperator, KfacOperator
from hessops.estimators import norm

v = torch.randn(334, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

kfac = KfacOperator(model, loss, loader)  # fisher_type="type-2"
ekfac = EkfacOperator(model, loss, loader)
empirical = KfacOperator(model, loss, loader, fisher_type="empirical")

# Weights and biases are one block here. Two operators see one kind of parameters each.
apart = torch.zeros_like(v)
for names in (["0.weight", "2.weight"], ["0.bias", "2.bias"]):
    places = kfac.space.indices(names)
    apart[places] = KfacOperator(model, loss, loader, restrict_to=names).apply(v[places])

torch.manual_seed(0)
inner = nn.Linear(16, 16)
twice = nn.Sequential(inner, nn.Tanh(), inner, nn.Tanh(), nn.Linear(16, 10)).double().eval()

results = {
    "KFAC": kfac.apply(v),
    "KFAC, empirical": empirical.apply(v),
    "KFAC, weights and biases apart": apart,
    "EKFAC": ekfac.apply(v),
    "inverse of KFAC, exact damping": kfac.inverse(regularization=0.01).apply(v),
    "inverse of KFAC, heuristic damping": kfac.inverse(
        regularization=0.01, damping="factored-tikhonov"
    ).apply(v),
    "inverse of EKFAC": ekfac.inverse(regularization=0.01).apply(v),
    "trace and norm of EKFAC": torch.tensor([ekfac.trace(), norm(ekfac).value], dtype=x.dtype),
    "trace of EKFAC, a layer called twice": EkfacOperator(twice, loss, loader).trace(),
}
differs = {
    "trace of EKFAC, a layer called twice": "curvlinops keeps the inputs of one call only; the "
    "trace of EKFAC is that of the exact matrix",
}
