"""Rows and columns of a Hessian, and products with a Jacobian."""

import torch
from curvlinops import (
    HessianLinearOperator,
    JacobianLinearOperator,
    SubmatrixLinearOperator,
    TransposedJacobianLinearOperator,
)
from setting import loader, loss, model, x

params = list(model.parameters())
v = torch.randn(334, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
u = torch.randn(2500, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
rows, columns = [3, 40, 333], [0, 41, 200, 333]

hessian = HessianLinearOperator(model, loss, params, loader)
part = SubmatrixLinearOperator(hessian, rows, columns)
diagonal_block = SubmatrixLinearOperator(hessian, columns, columns)

results = {
    "rows and columns": part @ v[:4],
    "transposed": part.adjoint() @ v[:3],
    "a diagonal block": diagonal_block @ v[:4],
    "Jacobian": JacobianLinearOperator(model, params, loader) @ v,
    "transposed Jacobian": TransposedJacobianLinearOperator(model, params, loader) @ u,
}
