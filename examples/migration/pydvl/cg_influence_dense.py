"""Influences from explicit matrices."""

import torch
from explicit_matrices import gradient_rows, hessian_matrix
from setting import loss, model, x, x_test, y, y_test

test = gradient_rows(model, loss, x_test, y_test)
train = gradient_rows(model, loss, x, y)
damping = 0.1 * torch.eye(train.shape[1], dtype=train.dtype)
scores = test @ torch.linalg.solve(hessian_matrix(model, loss, x, y) + damping, train.T)
fisher = train.T @ train / len(train)

results = {
    "influences, batches of 64": scores,
    "influences, one batch": scores,
    "Gauss-Newton": test[:2] @ torch.linalg.solve(fisher + damping, train.T),
}
