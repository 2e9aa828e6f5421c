"""The same from all eigenvalues."""

from math import log, sqrt

import torch
from explicit_matrices import hessian_matrix
from setting import loss, model, x, y

eigenvalues = torch.linalg.eigvalsh(hessian_matrix(model, loss, x, y))


def smoothed(centres, low, high, kappa):
    """The sum of Gaussians around all centres, on a grid with a margin of 5 %."""
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    grid = torch.linspace(low, high, 200, dtype=torch.float64)
    width = (high - low) / 79 / sqrt(8 * log(kappa))
    return grid, torch.distributions.Normal(centres, width).log_prob(grid[:, None]).exp().mean(1)


_, density = smoothed(eigenvalues, -0.02, 1.36, 3.0)
logs = (eigenvalues.abs() + 1e-2).log()
grid, log_density = smoothed(logs, log(1e-2), log(1.36 + 1e-2), 1.04)

results = {"density": density, "density of logarithms": log_density / grid.exp()}
