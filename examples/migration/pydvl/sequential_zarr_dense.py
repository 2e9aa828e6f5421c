"""Influences from explicit matrices."""

import torch
from explicit_matrices import gradient_rows, hessian_matrix
from setting import loss, model, x, x_test, y, y_test

train = gradient_rows(model, loss, x, y)
damping = 0.1 * torch.eye(train.shape[1], dtype=train.dtype)
test = gradient_rows(model, loss, x_test, y_test)
factors = torch.linalg.solve(hessian_matrix(model, loss, x, y) + damping, test.T).T

results = {
    "in memory": factors @ train.T,
    "in the store": factors @ train.T,
    "factors": factors,
    "factors in the store": factors,
    "from factors": factors @ train.T,
}
