"""The same by `torch.linalg`."""

import torch
from explicit_matrices import hessian_matrix, identity, theta
from setting import loss, model, x, y

rows = torch.randn(3, len(theta), generator=torch.Generator().manual_seed(1), dtype=theta.dtype)

damped = hessian_matrix(model, loss, x, y) + 0.05 * identity
eigenvalues, eigenvectors = torch.linalg.eigh(damped)
largest = eigenvalues.abs().argsort(descending=True)[:20]
of_largest = eigenvectors[:, largest]

results = {
    "20 eigenpairs, three rows": rows @ of_largest / eigenvalues[largest] @ of_largest.T,
    "all eigenpairs: the inverse": torch.linalg.solve(damped, rows[0]),
}
