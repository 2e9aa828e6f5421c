"""The same by explicit matrices."""

import torch
from explicit_matrices import gauss_newton, gradient_rows, hessian_matrix, outputs, theta
from setting import loss, model, x, y
from torch import nn
from torch.func import grad

columns = torch.randn(3, 334, generator=torch.Generator().manual_seed(1), dtype=x.dtype).T
targets = torch.randn(250, 10, generator=torch.Generator().manual_seed(2), dtype=x.dtype)

hessian, ggn = hessian_matrix(model, loss, x, y), gauss_newton(loss)
gradients = gradient_rows(model, loss, x, y)
of_squares = gradient_rows(model, nn.MSELoss(), x, targets)
blocks = torch.block_diag(hessian[:204, :204], hessian[204:, 204:])

results = {
    "Hessian": hessian @ columns,
    "GGN": ggn @ columns,
    "empirical Fisher": gradients.T @ gradients @ columns / 250,
    "empirical Fisher, 10 squared errors": of_squares.T @ of_squares @ columns / 250,
    "a list of tensors": (hessian @ theta)[:192].reshape(12, 16),
    "a block for each layer": blocks @ columns,
    "the last weight alone": hessian[204:324, 204:324] @ columns[:120],
    "0.9 H + 0.1 G": (0.9 * hessian + 0.1 * ggn) @ columns,
    "H @ G": hessian @ ggn @ columns,
    "largest eigenvalue by scipy": torch.linalg.eigvalsh(hessian)[-1:],
    "gradient of the mean loss": grad(lambda flat: loss(outputs(flat), y))(theta),
}
