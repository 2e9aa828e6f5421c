"""What the recursion of LiSSA tends to, from explicit matrices."""

import torch
from explicit_matrices import gradient_rows, hessian_matrix
from setting import loss, model, x, x_test, y, y_test

test = gradient_rows(model, loss, x_test, y_test)
train = gradient_rows(model, loss, x, y)
hessian = hessian_matrix(model, loss, x, y)
identity = torch.eye(len(hessian), dtype=hessian.dtype)

results = {
    "influences": test @ torch.linalg.solve(hessian + 0.5 * identity, train.T),
    # The dampening times the scale is added to the diagonal.
    "with dampening": test @ torch.linalg.solve(hessian + (0.5 + 0.1 * 2.0) * identity, train.T),
}
