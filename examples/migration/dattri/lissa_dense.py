"""The same recursion with the explicit Hessian."""

import torch
from explicit_matrices import hessian_matrix, theta
from setting import loss, model, x, y

rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)

matrix, current = hessian_matrix(model, loss, x, y), rows[0]
for _ in range(40):
    current = rows[0] + (1 - 0.02) * current - matrix @ current / 5.0

results = {"ihvp_lissa": current / 5.0, "ihvp_at_x_lissa": current / 5.0}
