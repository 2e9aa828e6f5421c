"""Losses, gradients and mixed derivatives of points, with hessops."""

import torch
from setting import loss, model, x_test, y_test

from hessops import DiagonalOperator, Objective
from hessops.functional import (
    create_matrix_jacobian_product_function,
    create_per_sample_gradient_function,
    create_per_sample_loss_function,
    create_per_sample_mixed_derivative_function,
)
from hessops.influence import BilinearForm, GradientProvider

objective = Objective(model, loss)
params, size = objective.params, objective.space.size
rows = torch.linspace(-1, 1, 3 * size, dtype=torch.float64).reshape(3, size)

losses = create_per_sample_loss_function(model, loss)(params, x_test, y_test)
gradients = create_per_sample_gradient_function(model, loss)(params, x_test, y_test)
mixed = create_per_sample_mixed_derivative_function(model, loss)(params, x_test, y_test)
products = create_matrix_jacobian_product_function(model, loss, rows)(params, x_test, y_test)

provider = GradientProvider(objective)
batch = provider.batch(x_test, y_test)
form = BilinearForm(DiagonalOperator(torch.arange(1.0, size + 1).double()))

results = {
    "losses": losses,
    "gradients": gradients["0.weight"],
    "mixed derivatives": mixed["0.weight"],
    "products with the Jacobian": products,
    "flat gradients": provider.flat_grads(x_test, y_test),
    "flat mixed derivatives": provider.flat_mixed_grads(x_test, y_test),
    "jacobian_prod": provider.jacobian_prod(x_test, y_test, rows),
    "bilinear form": form.grads_inner_prod(batch, None, provider),
}
