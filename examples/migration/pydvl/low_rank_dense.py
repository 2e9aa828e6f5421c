"""Influences from the eigenpairs of explicit matrices."""

import torch
from by_autograd import gradient_rows, hessian_matrix
from setting import loss, model, x, x_test, y, y_test
from torch import nn


def influences(module, transform):
    """The influences with a function of the eigenvalues in place of the inverse."""
    test = gradient_rows(module, loss, x_test, y_test)
    train = gradient_rows(module, loss, x, y)
    values, vectors = torch.linalg.eigh(hessian_matrix(module, loss, x, y))
    return (test @ vectors) * transform(values) @ (train @ vectors).T


def dominant(values):
    """Which are the twenty eigenvalues of largest absolute value."""
    return values.abs() >= values.abs().sort(descending=True).values[19]


torch.manual_seed(1)
linear = nn.Linear(16, 10).double()
arnoldi = influences(model, lambda values: dominant(values) / (values + 0.1))

results = {
    "Arnoldi, one batch": arnoldi,
    "Arnoldi, batches of 64": arnoldi,
    "Woodbury, one batch": influences(
        model, lambda v: 1 / (torch.where(dominant(v), v, 0.0) + 0.1)
    ),
    "Nyström, convex": influences(linear, lambda values: 1 / (values + 0.1)),
    "Nyström, indefinite": influences(model, lambda values: 1 / (values.clamp(min=0) + 0.1)),
}
