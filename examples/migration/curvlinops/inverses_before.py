"""Inverses of a damped Gauss-Newton matrix."""

import torch
from curvlinops import (
    CGInverseLinearOperator,
    GGNLinearOperator,
    LSMRInverseLinearOperator,
    NeumannInverseLinearOperator,
)
from curvlinops.examples import IdentityLinearOperator
from setting import loader, loss, model, x

params = list(model.parameters())
b = torch.randn(334, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
identity = IdentityLinearOperator([p.shape for p in params], x.device, x.dtype)
damped = GGNLinearOperator(model, loss, params, loader) + 0.01 * identity

results = {
    "CG, the defaults": CGInverseLinearOperator(damped) @ b,
    "CG, tolerance=1e-10": CGInverseLinearOperator(damped, tolerance=1e-10) @ b,
    "CG, tolerance=1e-10, eps=1e-30": CGInverseLinearOperator(damped, tolerance=1e-10, eps=1e-30)
    @ b,
    "CG, a tiny right-hand side": CGInverseLinearOperator(damped) @ (1e-12 * b),
    "LSMR": LSMRInverseLinearOperator(damped, atol=1e-12, btol=1e-12, maxiter=2000, conlim=0) @ b,
    "Neumann, 100 terms": NeumannInverseLinearOperator(damped, num_terms=100, scale=0.5) @ b,
}
