"""The same by `torch.linalg`."""

import torch
from explicit_matrices import identity, loss_hessian, theta
from setting import loss

rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)

solution = torch.linalg.solve(loss_hessian(loss) + 0.05 * identity, rows.T).T

results = {"ihvp_explicit": solution[0], "ihvp_at_x_explicit, three rows": solution}
