"""Influences from the eigenpairs of explicit matrices."""

import torch
from explicit_matrices import gradient_rows, hessian_matrix
from setting import loss, model, x, x_test, y, y_test
from torch import nn


def influences_by(module):
    """The influences, given a function of the eigenvalues in place of the inverse."""
    test = gradient_rows(module, loss, x_test, y_test)
    train = gradient_rows(module, loss, x, y)
    values, vectors = torch.linalg.eigh(hessian_matrix(module, loss, x, y))
    return lambda inverted: (test @ vectors) * inverted(values) @ (train @ vectors).T


def dominant(values):
    """Which are the twenty eigenvalues of largest absolute value."""
    return values.abs() >= values.abs().sort(descending=True).values[19]


torch.manual_seed(1)
of_linear, of_network = influences_by(nn.Linear(16, 10).double()), influences_by(model)
arnoldi = of_network(lambda values: dominant(values) / (values + 0.1))

results = {
    "Arnoldi, one batch": arnoldi,
    "Arnoldi, batches of 64": arnoldi,
    "Woodbury, one batch": of_network(lambda v: 1 / (torch.where(dominant(v), v, 0.0) + 0.1)),
    "Nyström, convex": of_linear(lambda values: 1 / (values + 0.1)),
    "Nyström, indefinite": of_network(lambda values: 1 / (values.clamp(min=0) + 0.1)),
}
