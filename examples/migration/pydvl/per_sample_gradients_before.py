"""Losses, gradients and mixed derivatives of points, with pyDVL."""

import torch
from pydvl.influence.torch.base import OperatorBilinearForm, TorchBatch, TorchGradientProvider
from pydvl.influence.torch.functional import (
    create_matrix_jacobian_product_function,
    create_per_sample_gradient_function,
    create_per_sample_loss_function,
    create_per_sample_mixed_derivative_function,
)
from pydvl.influence.torch.operator import MatrixOperator
from pydvl.influence.torch.util import get_model_parameters
from setting import loss, model, x_test, y_test

params = get_model_parameters(model)
size = sum(p.numel() for p in params.values())
rows = torch.linspace(-1, 1, 3 * size, dtype=torch.float64).reshape(3, size)

losses = create_per_sample_loss_function(model, loss)(params, x_test, y_test)
gradients = create_per_sample_gradient_function(model, loss)(params, x_test, y_test)
mixed = create_per_sample_mixed_derivative_function(model, loss)(params, x_test, y_test)
products = create_matrix_jacobian_product_function(model, loss, rows)(params, x_test, y_test)

batch = TorchBatch(x_test, y_test)
# In pyDVL 0.10.0 `restrict_to=None` is an error.
provider = TorchGradientProvider(model, loss, restrict_to=params)
form = OperatorBilinearForm(MatrixOperator(torch.diag(torch.arange(1.0, size + 1).double())))

results = {
    "losses": losses,
    "gradients": gradients["0.weight"],
    "mixed derivatives": mixed["0.weight"],
    "products with the Jacobian": products,
    "flat gradients": provider.flat_grads(batch),
    "flat mixed derivatives": provider.flat_mixed_grads(batch),
    "jacobian_prod": provider.jacobian_prod(batch, rows),
    "bilinear form": form.grads_inner_prod(batch, None, provider),
}
