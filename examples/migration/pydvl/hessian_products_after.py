"""Products with curvature matrices, with hessops."""

import torch
from setting import loader, loss, model, x, y

from hessops import GaussNewtonOperator, HessianOperator
from hessops.functional import (
    create_batch_loss_function,
    create_hvp_function,
    gauss_newton,
    hessian,
    hvp,
)

operator = HessianOperator(model, loss, loader)
space = operator.space
vector = torch.linspace(-1, 1, space.size, dtype=torch.float64)
rows = torch.stack([vector, vector.flip(0), vector.cos()])

params = space.unflatten(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
restricted = HessianOperator(model, loss, loader, restrict_to=["2.bias"])
fisher = GaussNewtonOperator(model, loss, loader)
batch_loss = create_batch_loss_function(model, loss)
product = hvp(lambda p: batch_loss(p, x, y), params, space.unflatten(vector))
stack = {name: torch.stack([p, 2 * p]) for name, p in params.items()}

results = {
    "Hessian, vector": operator.apply(vector),
    "Hessian, 3 rows": operator.apply(rows),
    "Hessian, dictionary": operator.apply_to_dict(stack)["0.weight"],
    "Hessian, one layer": restricted.apply(vector[:10]),
    "dense Hessian": hessian(model, loss, loader),
    "hvp": space.flatten(product),
    "hvp of the loader": create_hvp_function(model, loss, loader)(vector),
    "hvp, batch by batch": create_hvp_function(model, loss, loader, precompute_grad=False)(vector),
    "Gauss-Newton, vector": fisher.apply(vector),
    "Gauss-Newton, 3 rows": fisher.apply(rows),
    "dense Gauss-Newton": gauss_newton(model, loss, loader),
}
RAGGED = "pyDVL takes the mean of the batch means"
WEIGHTS = "`PointAveraging` of pyDVL weights batches by the shape of the product"
differs = {
    "Hessian, vector": RAGGED,
    "Hessian, 3 rows": RAGGED,
    "Hessian, dictionary": RAGGED,
    "Hessian, one layer": RAGGED,
    "hvp of the loader": "pyDVL returns a row `(1, P)` for a vector `(P,)`",
    "hvp, batch by batch": RAGGED,
    "Gauss-Newton, vector": WEIGHTS,
    "Gauss-Newton, 3 rows": WEIGHTS,
    "dense Gauss-Newton": "pyDVL divides the sum over points by (batches − 1) · P",
}
