"""KFAC and EKFAC, their inverses, and a layer that is called twice."""

import torch
from curvlinops import (
    EKFACLinearOperator,
    FisherType,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    KFACType,
)
from setting import loader, loss, model, x
from torch import nn

params = list(model.parameters())
v = torch.randn(334, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
joint = {"separate_weight_and_bias": False}

kfac = KFACLinearOperator(model, loss, params, loader, fisher_type=FisherType.TYPE2, **joint)
ekfac = EKFACLinearOperator(model, loss, params, loader, fisher_type=FisherType.TYPE2, **joint)
empirical = KFACLinearOperator(
    model, loss, params, loader, fisher_type=FisherType.EMPIRICAL, **joint
)
apart = KFACLinearOperator(
    model, loss, params, loader, fisher_type=FisherType.TYPE2, kfac_approx=KFACType.EXPAND
)

torch.manual_seed(0)
inner = nn.Linear(16, 16)
twice = nn.Sequential(inner, nn.Tanh(), inner, nn.Tanh(), nn.Linear(16, 10)).double().eval()
of_twice = EKFACLinearOperator(
    twice, loss, list(twice.parameters()), loader, fisher_type=FisherType.TYPE2, **joint
)

results = {
    "KFAC": kfac @ v,
    "KFAC, empirical": empirical @ v,
    "KFAC, weights and biases apart": apart @ v,
    "EKFAC": ekfac @ v,
    "inverse of KFAC, exact damping": KFACInverseLinearOperator(
        kfac, damping=0.01, use_exact_damping=True
    )
    @ v,
    "inverse of KFAC, heuristic damping": KFACInverseLinearOperator(
        kfac, damping=0.01, use_heuristic_damping=True
    )
    @ v,
    "inverse of EKFAC": KFACInverseLinearOperator(ekfac, damping=0.01, use_exact_damping=True) @ v,
    "trace and norm of EKFAC": torch.stack([ekfac.trace, ekfac.frobenius_norm]),
    "trace of EKFAC, a layer called twice": of_twice.trace,
}
