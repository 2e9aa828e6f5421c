"""The same by `torch.linalg`, and the series with an explicit matrix."""

import torch
from explicit_matrices import gauss_newton, identity
from setting import loss, x

b = torch.randn(334, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
damped = gauss_newton(loss) + 0.01 * identity
solution = torch.linalg.solve(damped, b)

term, series = b, b.clone()
for _ in range(100):
    term = term - 0.5 * damped @ term
    series += term

results = {
    "CG, the defaults": solution,
    "CG, tolerance=1e-10": solution,
    "CG, tolerance=1e-10, eps=1e-30": solution,
    "CG, a tiny right-hand side": 1e-12 * solution,
    "LSMR": solution,
    "Neumann, 100 terms": 0.5 * series,
}
