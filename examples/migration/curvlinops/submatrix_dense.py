"""The same by explicit matrices."""

import torch
from explicit_matrices import hessian_matrix, outputs, theta
from setting import loss, model, x, y
from torch.func import jacrev

v = torch.randn(334, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
u = torch.randn(2500, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
rows, columns = [3, 40, 333], [0, 41, 200, 333]
matrix = hessian_matrix(model, loss, x, y)
jacobian = jacrev(outputs)(theta).reshape(2500, 334)

results = {
    "rows and columns": matrix[rows][:, columns] @ v[:4],
    "transposed": matrix[columns][:, rows] @ v[:3],
    "a diagonal block": matrix[columns][:, columns] @ v[:4],
    "Jacobian": jacobian @ v,
    "transposed Jacobian": jacobian.T @ u,
}
