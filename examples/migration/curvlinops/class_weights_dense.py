"""The same by explicit matrices of the loss of all points; EKFAC has the trace of the GGN."""

import torch
from explicit_matrices import gauss_newton, hessian_matrix
from setting import model, x, y
from torch import nn

v = torch.randn(334, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
weights = torch.linspace(0.2, 3.0, 10, dtype=x.dtype)
sums = nn.CrossEntropyLoss(weight=weights, reduction="sum")
counted = nn.CrossEntropyLoss(ignore_index=3, reduction="sum")
ggn = len(y) * gauss_newton(sums) / weights[y].sum()
without_3 = len(y) * gauss_newton(counted) / (y != 3).sum()

results = {
    "Hessian, weighted": hessian_matrix(model, nn.CrossEntropyLoss(weight=weights), x, y) @ v,
    "GGN, weighted": ggn @ v,
    "trace of EKFAC, weighted": ggn.trace(),
    "GGN, label 3 ignored": without_3 @ v,
    "trace of EKFAC, label 3 ignored": without_3.trace(),
}
