"""Estimates of trace, diagonal and norm from 120 products."""

import torch
from curvlinops import (
    GGNLinearOperator,
    hutchinson_diag,
    hutchinson_squared_fro,
    hutchinson_trace,
    hutchpp_trace,
    xdiag,
    xtrace,
)
from setting import loader, loss, model
from torch import nn

torch.manual_seed(0)
ggn = GGNLinearOperator(model, loss, list(model.parameters()), loader)

# Of 60 features only three are ever on, so that the matrix has rank three.
features = torch.eye(3, 60, dtype=torch.float64).repeat(10, 1)
line = nn.Linear(60, 1, bias=False).double()
sparse = [(features, torch.zeros(30, 1, dtype=torch.float64))]
of_rank_3 = GGNLinearOperator(line, nn.MSELoss(), list(line.parameters()), sparse)
try:
    trace_of_rank_3 = xtrace(of_rank_3, num_matvecs=30)
except RuntimeError:  # the matrix to invert is singular
    trace_of_rank_3 = float("nan")

results = {
    "trace, Hutchinson": hutchinson_trace(ggn, num_matvecs=300),
    "trace, Hutch++": hutchpp_trace(ggn, num_matvecs=120),
    "trace, XTrace": xtrace(ggn, num_matvecs=120),
    "diagonal, Hutchinson": hutchinson_diag(ggn, num_matvecs=300),
    "diagonal, XDiag": xdiag(ggn, num_matvecs=120),
    "squared Frobenius norm": hutchinson_squared_fro(ggn, num_matvecs=300),
    "trace of rank three, XTrace": trace_of_rank_3,
}
