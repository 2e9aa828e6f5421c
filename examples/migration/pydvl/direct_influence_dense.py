"""Influences from explicit matrices."""

import torch
from explicit_matrices import gradient_rows, hessian_matrix, mixed_derivatives, rows_of
from setting import loss, model, x, x_test, y, y_test

test = gradient_rows(model, loss, x_test, y_test)
train = gradient_rows(model, loss, x, y)
hessian = hessian_matrix(model, loss, x, y)
mixed = mixed_derivatives(model, loss, x[:20], y[:20])


def damped_inverse(matrix, damping):
    """The inverse of a matrix with a multiple of the identity added."""
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype))


def by_layer(name):
    """The influences through one diagonal block of the Hessian."""
    rows = rows_of(model, name)
    return test[:, rows] @ damped_inverse(hessian[rows, rows], 0.1) @ train[:, rows].T


factors = test @ damped_inverse(hessian, 0.1)
fisher = train.T @ train / len(train)

results = {
    "influences": factors @ train.T,
    "by the input": torch.einsum("mp,nxp->mnx", factors, mixed),
    "factors": factors,
    "by the input, from factors": torch.einsum("mp,nxp->mnx", factors, mixed),
    "of points on themselves": (factors * test).sum(dim=1),
    "layer 0": by_layer("0"),
    "layer 2": by_layer("2"),
    "another λ": test @ damped_inverse(hessian, 0.5) @ train.T,
    "Gauss-Newton": test @ damped_inverse(fisher, 0.1) @ train.T,
}
