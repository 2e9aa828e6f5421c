"""The same by explicit matrices, and EKFAC by loops over points and layers."""

import torch
from explicit_matrices import gradient_rows, hessian_matrix, identity, theta
from setting import loss, model, x, x_test, y, y_test

train, test = gradient_rows(model, loss, x, y), gradient_rows(model, loss, x_test, y_test)
exact = train @ torch.linalg.solve(hessian_matrix(model, loss, x, y) + 0.05 * identity, test.T)

# Weight and bias of the first layer, then of the second.
layers = [torch.arange(204), torch.arange(204, 334)]

data_inf = torch.zeros_like(exact)
for part in layers:
    damped = 0.05 * torch.eye(len(part), dtype=theta.dtype)
    for g in train[:, part]:
        outer = torch.outer(g, g) + damped
        data_inf += train[:, part] @ torch.linalg.solve(outer, test[:, part].T) / len(x)


def matrices(rows, part, outputs):
    """Gradients of a layer as matrices, the bias as a last column."""
    weight, bias = rows[:, part].split([len(part) - outputs, outputs], dim=1)
    return torch.cat([weight.reshape(len(rows), outputs, -1), bias.unsqueeze(2)], dim=2)


hidden = torch.tanh(model[0](x)).detach()
ekfac = torch.zeros_like(exact)
for part, inputs, outputs in [(layers[0], x, 12), (layers[1], hidden, 10)]:
    a = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    of_train, of_test = matrices(train, part, outputs), matrices(test, part, outputs)
    b = of_train[:, :, -1]  # the gradient by the outputs is that by the bias
    q_a = torch.linalg.eigh(a.T @ a / len(x))[1]
    q_b = torch.linalg.eigh(b.T @ b / len(x))[1]
    eigenvalues = (q_b.T @ of_train @ q_a).square().mean(dim=0)
    solved = q_b @ (q_b.T @ of_test @ q_a / (eigenvalues + 0.05)) @ q_a.T
    ekfac += of_train.flatten(1) @ solved.flatten(1).T

results = {
    "explicit, data in one batch": exact,
    "explicit, data in four batches": exact,
    "CG, data in one batch": exact,
    "DataInf": data_inf,
    "EKFAC": ekfac,
}
