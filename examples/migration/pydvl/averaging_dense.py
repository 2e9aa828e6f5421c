"""The same from explicit matrices."""

import torch
from explicit_matrices import gradient_rows, hessian_matrix
from setting import loader, loss, model, x, y

gradients = gradient_rows(model, loss, x[:64], y[:64])
identity = torch.eye(gradients.shape[1], dtype=gradients.dtype)
vector = torch.linspace(-1, 1, len(identity), dtype=torch.float64)
rows = torch.stack([vector, vector.flip(0), vector.cos()])
harmonic = [torch.linalg.solve(torch.outer(g, g) + 0.1 * identity, rows.T) for g in gradients]
of_batches = [hessian_matrix(model, loss, *batch) for batch in loader]

results = {
    "Hessian of a batch": rows @ of_batches[0],
    "Gauss-Newton of a batch": rows @ gradients.T @ gradients / 64,
    "inverse harmonic mean of a batch": sum(harmonic).T / 64,
    "mean of batch means": rows @ sum(of_batches) / len(of_batches),
    "mean over points": rows @ hessian_matrix(model, loss, x, y),
}
