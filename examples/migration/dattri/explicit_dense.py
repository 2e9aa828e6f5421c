"""The same by `torch.linalg`."""

import torch
from explicit_matrices import hessian_matrix, identity, theta
from setting import loss, model, x, y

rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)

solution = torch.linalg.solve(hessian_matrix(model, loss, x, y) + 0.05 * identity, rows.T).T

results = {"ihvp_explicit": solution[0], "ihvp_at_x_explicit, three rows": solution}
