"""Products with curvature matrices, with pyDVL."""

import torch
from pydvl.influence.torch.functional import (
    create_batch_loss_function,
    create_hvp_function,
    gauss_newton,
    hessian,
    hvp,
)
from pydvl.influence.torch.operator import GaussNewtonOperator, HessianOperator
from pydvl.influence.torch.util import align_structure, flatten_dimensions, get_model_parameters
from setting import loader, loss, model, x, y

params = get_model_parameters(model)
size = sum(p.numel() for p in params.values())
vector = torch.linspace(-1, 1, size, dtype=torch.float64)
rows = torch.stack([vector, vector.flip(0), vector.cos()])

operator = HessianOperator(model, loss, loader)
restricted = HessianOperator(model, loss, loader, restrict_to={"2.bias": params["2.bias"]})
fisher = GaussNewtonOperator(model, loss, loader)
batch_loss = create_batch_loss_function(model, loss)
product = hvp(lambda p: batch_loss(p, x, y), params, align_structure(params, vector))
stack = {name: torch.stack([p, 2 * p]) for name, p in params.items()}

results = {
    "Hessian, vector": operator.apply(vector),
    "Hessian, 3 rows": operator.apply(rows),
    "Hessian, dictionary": operator.apply_to_dict(stack)["0.weight"],
    "Hessian, one layer": restricted.apply(vector[:10]),
    "dense Hessian": hessian(model, loss, loader),
    "hvp": flatten_dimensions(product.values()),
    "hvp of the loader": create_hvp_function(model, loss, loader)(vector),
    "hvp, batch by batch": create_hvp_function(model, loss, loader, precompute_grad=False)(vector),
    "Gauss-Newton, vector": fisher.apply(vector),
    "Gauss-Newton, 3 rows": fisher.apply(rows),
    "dense Gauss-Newton": gauss_newton(model, loss, loader),
}
