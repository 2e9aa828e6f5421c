"""Estimates of trace, diagonal and norm from 120 products."""

import torch
from setting import loader, loss, model
from torch import nn

from hessops import GeneralizedGaussNewtonOperator
from hessops.estimators import diagonal, norm, trace

torch.manual_seed(0)
ggn = GeneralizedGaussNewtonOperator(model, loss, loader)

# Of 60 features only three are ever on, so that the matrix has rank three.
features = torch.eye(3, 60, dtype=torch.float64).repeat(10, 1)
line = nn.Linear(60, 1, bias=False).double()
sparse = [(features, torch.zeros(30, 1, dtype=torch.float64))]
of_rank_3 = GeneralizedGaussNewtonOperator(line, nn.MSELoss(), sparse)

results = {
    "trace, Hutchinson": trace(ggn, "hutchinson", num_products=300).value,
    "trace, Hutch++": trace(ggn, "hutch++", num_products=120).value,
    "trace, XTrace": trace(ggn, num_products=120).value,
    "diagonal, Hutchinson": diagonal(ggn, "hutchinson", num_products=300).value,
    "diagonal, XDiag": diagonal(ggn, num_products=120).value,
    "squared Frobenius norm": norm(ggn, num_products=300).value ** 2,
    "trace of rank three, XTrace": trace(of_rank_3, num_products=30).value,
}
differs = {
    "trace of rank three, XTrace": "fewer directions than vectors make a factor singular, which "
    "curvlinops inverts: an error of torch (NaN here), or by luck of rounding none",
}
# Random numbers: two estimates may be as far apart as their errors.
tolerances = {
    "trace, Hutchinson": 0.1,
    "trace, Hutch++": 0.02,
    "trace, XTrace": 0.01,
    "diagonal, Hutchinson": 0.3,
    "diagonal, XDiag": 0.05,
    "squared Frobenius norm": 0.2,
}
