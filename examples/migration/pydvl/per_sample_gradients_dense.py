"""The same, one point and one entry at a time."""

import torch
from explicit_matrices import gradient_rows, mixed_derivatives, rows_of
from setting import loss, model, x_test, y_test

gradients = gradient_rows(model, loss, x_test, y_test)
mixed = mixed_derivatives(model, loss, x_test, y_test)
size = gradients.shape[1]
rows = torch.linspace(-1, 1, 3 * size, dtype=torch.float64).reshape(3, size)
first = rows_of(model, "0.weight")
losses = [
    loss(model(point[None]), label[None]) for point, label in zip(x_test, y_test, strict=True)
]

results = {
    "losses": torch.stack(losses).detach(),
    "gradients": gradients[:, first].reshape(8, 12, 16),
    "mixed derivatives": mixed[:, :, first].reshape(8, 16, 12, 16),
    "products with the Jacobian": rows @ gradients.T,
    "flat gradients": gradients,
    "flat mixed derivatives": mixed,
    "jacobian_prod": rows @ gradients.T,
    "bilinear form": (gradients * torch.arange(1, size + 1)) @ gradients.T,
}
