"""Matrices of a loss with class weights, and with a label that does not count."""

import torch
from curvlinops import EKFACLinearOperator, FisherType, GGNLinearOperator, HessianLinearOperator
from setting import loader, model, x
from torch import nn

params = list(model.parameters())
v = torch.randn(334, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
weighted = nn.CrossEntropyLoss(weight=torch.linspace(0.2, 3.0, 10, dtype=x.dtype))
without_3 = nn.CrossEntropyLoss(ignore_index=3)


def ekfac(loss):
    return EKFACLinearOperator(
        model, loss, params, loader, fisher_type=FisherType.TYPE2, separate_weight_and_bias=False
    )


results = {
    "Hessian, weighted": HessianLinearOperator(model, weighted, params, loader) @ v,
    "GGN, weighted": GGNLinearOperator(model, weighted, params, loader) @ v,
    "trace of EKFAC, weighted": ekfac(weighted).trace,
    "GGN, label 3 ignored": GGNLinearOperator(model, without_3, params, loader) @ v,
    "trace of EKFAC, label 3 ignored": ekfac(without_3).trace,
}
