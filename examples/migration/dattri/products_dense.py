"""The same by the explicit Hessian."""

import torch
from explicit_matrices import hessian_matrix, identity, theta
from setting import loss, model, x, y

rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)
matrix = hessian_matrix(model, loss, x, y)
of_sum = 6 * torch.arange(1.0, 4.0)  # of Σ wᵢ tᵢ³ at t = 1, times ones

results = {
    "hvp": matrix @ rows[0],
    "hvp, forward mode": matrix @ rows[0],
    "hvp_at_x, with λ": (matrix + 0.1 * identity) @ rows[0],
    "three rows": rows @ matrix,
    "by the second argument": of_sum,
    "argnums=-1, forward mode": of_sum,
}
