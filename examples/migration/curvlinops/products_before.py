"""Products with three matrices of a model over a loader whose last batch is smaller."""

import torch
from curvlinops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from scipy.sparse.linalg import eigsh
from setting import loader, loss, model, x
from torch import nn

params = list(model.parameters())
size = sum(p.numel() for p in params)
columns = torch.randn(3, size, generator=torch.Generator().manual_seed(1), dtype=x.dtype).T
targets = torch.randn(250, 10, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
regression = list(zip(x.split(64), targets.split(64), strict=True))

hessian = HessianLinearOperator(model, loss, params, loader)
ggn = GGNLinearOperator(model, loss, params, loader)
blocks = HessianLinearOperator(model, loss, params, loader, block_sizes=[2, 2])
weight = HessianLinearOperator(model, loss, [params[2]], loader)
of_squares = EFLinearOperator(model, nn.MSELoss(), params, regression)
gradient, value = hessian.gradient_and_loss()

results = {
    "Hessian": hessian @ columns,
    "GGN": ggn @ columns,
    "empirical Fisher": EFLinearOperator(model, loss, params, loader) @ columns,
    "empirical Fisher, 10 squared errors": of_squares @ columns,
    "a list of tensors": (hessian @ [p.detach() for p in params])[0],
    "a block for each layer": blocks @ columns,
    "the last weight alone": weight @ columns[:120],
    "0.9 H + 0.1 G": (0.9 * hessian + 0.1 * ggn) @ columns,
    "H @ G": (hessian @ ggn) @ columns,
    "largest eigenvalue by scipy": eigsh(hessian.to_scipy(), k=1, which="LA")[0],
    "gradient of the mean loss": torch.cat([g.flatten() for g in gradient]),
}
