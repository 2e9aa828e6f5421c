"""Products with explicit matrices."""

import torch
from explicit_matrices import gradient_rows, hessian_matrix, rows_of
from setting import loss, model, x, y

matrix = hessian_matrix(model, loss, x, y)
gradients = gradient_rows(model, loss, x, y)
fisher = gradients.T @ gradients / len(x)
vector = torch.linspace(-1, 1, len(matrix), dtype=torch.float64)
rows = torch.stack([vector, vector.flip(0), vector.cos()])
flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
stack = torch.stack([flat, 2 * flat]) @ matrix
bias = rows_of(model, "2.bias")

results = {
    "Hessian, vector": matrix @ vector,
    "Hessian, 3 rows": rows @ matrix,
    "Hessian, dictionary": stack[:, rows_of(model, "0.weight")].reshape(2, 12, 16),
    "Hessian, one layer": matrix[bias, bias] @ vector[:10],
    "dense Hessian": matrix,
    "hvp": matrix @ vector,
    "hvp of the loader": matrix @ vector,
    "hvp, batch by batch": matrix @ vector,
    "Gauss-Newton, vector": fisher @ vector,
    "Gauss-Newton, 3 rows": rows @ fisher,
    "dense Gauss-Newton": fisher,
}
