"""Inverses of a damped Gauss-Newton matrix."""

import torch
from setting import loader, loss, model, x

from hessops import (
    CgOperator,
    GeneralizedGaussNewtonOperator,
    LissaOperator,
    MinresOperator,
)

b = torch.randn(334, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
damped = GeneralizedGaussNewtonOperator(model, loss, loader).shift(0.01)
neumann = LissaOperator.from_operator(damped, scale=2.0, maxiter=100, warn_on_max_iteration=False)
closely = CgOperator(damped, rtol=1e-10).apply(b)

results = {
    "CG, the defaults": CgOperator(damped).apply(b),
    "CG, tolerance=1e-10": closely,
    "CG, tolerance=1e-10, eps=1e-30": closely,
    "CG, a tiny right-hand side": CgOperator(damped, rtol=1e-10).apply(1e-12 * b),
    "LSMR": MinresOperator(damped, rtol=1e-11).apply(b),
    "Neumann, 100 terms": neumann.apply(b),  # scale=2.0 is one over that of curvlinops
}
differs = {
    "CG, the defaults": "the default tolerance of linear_operator is 1: the solve ends after 11 "
    "steps, without a warning",
    "CG, tolerance=1e-10": "steps along which the curvature is below eps=1e-10 are left out, "
    "whatever the size of the residual",
    "CG, a tiny right-hand side": "a right-hand side with a norm below eps=1e-10 counts as zero",
}
tolerances = {"CG, the defaults": 1e-6}
