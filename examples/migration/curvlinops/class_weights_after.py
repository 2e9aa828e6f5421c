"""Matrices of a loss with class weights, and with a label that does not count.

Such a loss is no mean over points, and is refused as one. Its value for each point is unambiguous:
pass that, and divide by the sum of all weights.
"""

import torch
from setting import loader, model, x, y
from torch import nn

from hessops import EkfacOperator, GeneralizedGaussNewtonOperator, HessianOperator

v = torch.randn(334, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
weights = torch.linspace(0.2, 3.0, 10, dtype=x.dtype)
weighted = nn.CrossEntropyLoss(weight=weights, reduction="none")
without_3 = nn.CrossEntropyLoss(ignore_index=3, reduction="none")
per_weight = len(y) / weights[y].sum().item()
per_counted = len(y) / (y != 3).sum().item()


def build(operator_type, loss):
    return operator_type(model, loss, loader, reduction="none")


results = {
    "Hessian, weighted": (per_weight * build(HessianOperator, weighted)).apply(v),
    "GGN, weighted": (per_weight * build(GeneralizedGaussNewtonOperator, weighted)).apply(v),
    "trace of EKFAC, weighted": per_weight * build(EkfacOperator, weighted).trace(),
    "GGN, label 3 ignored": (per_counted * build(GeneralizedGaussNewtonOperator, without_3)) @ v,
    "trace of EKFAC, label 3 ignored": per_counted * build(EkfacOperator, without_3).trace(),
}
_by_batch = "curvlinops averages the weighted means of batches by their numbers of points"
_unseen = "KFAC and EKFAC of curvlinops do not look at weight and ignore_index"
differs = {
    "Hessian, weighted": _by_batch,
    "GGN, weighted": _by_batch,
    "trace of EKFAC, weighted": _unseen,
    "GGN, label 3 ignored": _by_batch,
    "trace of EKFAC, label 3 ignored": _unseen,
}
