"""The density of the eigenvalues of a Hessian, and of their logarithms."""

from math import log, sqrt

import torch
from setting import loader, loss, model

from hessops import HessianOperator
from hessops.estimators import spectral_density

torch.manual_seed(0)
hessian = HessianOperator(model, loss, loader)
density = spectral_density(hessian, num_probes=10, num_steps=80)


def grid_and_width(smallest, largest, kappa, points=200, steps=80, margin=0.05):
    """The grid of curvlinops, and the width of its Gaussians on it."""
    padding = margin * (largest - smallest)
    low, high = smallest - padding, largest + padding
    width = (high - low) / 2 * 2 / (steps - 1) / sqrt(8 * log(kappa))
    return torch.linspace(low, high, points, dtype=torch.float64), width


linear_grid, linear_width = grid_and_width(-0.02, 1.36, kappa=3.0)
values, standard_errors = density.on(linear_grid, width=linear_width)

epsilon = 1e-2
log_grid, log_width = grid_and_width(log(epsilon), log(1.36 + epsilon), kappa=1.04)
nodes = (density.nodes.abs() + epsilon).log()
kernel = torch.exp(-0.5 * ((log_grid[:, None, None] - nodes) / log_width) ** 2)
of_logs = (kernel * density.weights).sum(dim=2).mean(dim=1) / (sqrt(2 * torch.pi) * log_width)

results = {"density": values, "density of logarithms": of_logs / log_grid.exp()}
tolerances = {"density": 0.1, "density of logarithms": 0.15}  # random probes
