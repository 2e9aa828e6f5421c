"""The same by `torch.linalg`."""

import torch

torch.manual_seed(0)
basis, _ = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))
values = torch.logspace(0, -4, 60, dtype=torch.float64)
matrix = (basis * values) @ basis.T
rhs = torch.randn(4, 60, dtype=torch.float64)
solution = torch.linalg.solve(matrix + 1e-2 * torch.eye(60, dtype=torch.float64), rhs.T).T
first = basis[:, :10]
inside = (rhs @ first / (values[:10] + 1e-2)) @ first.T

results = {
    "products": rhs @ matrix,
    "a matrix times a vector": matrix @ rhs[0],
    "direct": solution,
    "CG": solution,
    "CG of a vector": solution[0],
    "CG, preconditioned": solution,
    "block CG": solution,
    "low rank": inside + (rhs - rhs @ first @ first.T) / 1e-2,
    "low rank, eigenspace alone": inside,
    "eigenvalues": values[:10].flip(0),
}
