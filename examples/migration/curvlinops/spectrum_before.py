"""The density of the eigenvalues of a Hessian, and of their logarithms."""

import torch
from curvlinops import (
    HessianLinearOperator,
    LanczosApproximateLogSpectrumCached,
    LanczosApproximateSpectrumCached,
)
from setting import loader, loss, model

torch.manual_seed(0)
hessian = HessianLinearOperator(model, loss, list(model.parameters()), loader)
# The ends are given here, so that both libraries smooth by the same width.
linear = LanczosApproximateSpectrumCached(hessian, ncv=80, boundaries=(-0.02, 1.36))
_, density = linear.approximate_spectrum(num_repeats=10, num_points=200)
logarithmic = LanczosApproximateLogSpectrumCached(hessian, ncv=80, boundaries=(0.0, 1.36))
_, log_density = logarithmic.approximate_log_spectrum(
    num_repeats=10, num_points=200, kappa=1.04, epsilon=1e-2
)

results = {"density": density, "density of logarithms": log_density}
