"""Products with three matrices of a model over a loader whose last batch is smaller."""

import torch
from scipy.sparse.linalg import eigsh
from setting import loader, loss, model, x
from torch import nn
from torch.func import grad

from hessops import (
    BlockDiagonalOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
)
from hessops.functional import create_empirical_loss_function

size = sum(p.numel() for p in model.parameters())
columns = torch.randn(3, size, generator=torch.Generator().manual_seed(1), dtype=x.dtype).T
targets = torch.randn(250, 10, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
regression = list(zip(x.split(64), targets.split(64), strict=True))

hessian = HessianOperator(model, loss, loader)
ggn = GeneralizedGaussNewtonOperator(model, loss, loader)
layers = [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
blocks = BlockDiagonalOperator([hessian.restricted(names) for names in layers])
weight = hessian.restricted(["2.weight"])
of_squares = GaussNewtonOperator(model, nn.MSELoss(), regression)
named = {name: p.detach() for name, p in model.named_parameters()}
gradient = grad(create_empirical_loss_function(model, loss, loader))(named)

results = {
    "Hessian": hessian.apply(columns.T).T,  # rows in, rows out; `hessian @ columns` is the same
    "GGN": ggn @ columns,
    "empirical Fisher": GaussNewtonOperator(model, loss, loader) @ columns,
    "empirical Fisher, 10 squared errors": of_squares @ columns,
    "a list of tensors": hessian.apply_to_dict(named)["0.weight"],
    "a block for each layer": blocks @ columns,
    "the last weight alone": weight @ columns[:120],
    "0.9 H + 0.1 G": (0.9 * hessian + 0.1 * ggn) @ columns,
    "H @ G": (hessian @ ggn) @ columns,
    "largest eigenvalue by scipy": eigsh(hessian.to_scipy(), k=1, which="LA")[0],
    "gradient of the mean loss": torch.cat([g.flatten() for g in gradient.values()]),
}
differs = {
    "empirical Fisher, 10 squared errors": "MSELoss is the mean over the outputs of a point; "
    "curvlinops squares gradients of their sum, and is as many times larger as there are outputs",
}
