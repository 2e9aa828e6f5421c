"""Pure functions: products with Hessians and Jacobians, per-sample gradients, low rank."""

from hessops.functional.gradients import mean_gradient, per_sample_gradients
from hessops.functional.low_rank import LowRankProductRepresentation
from hessops.functional.products import (
    JacobianProducts,
    StackedGradient,
    hessian_products,
)

__all__ = [
    "JacobianProducts",
    "LowRankProductRepresentation",
    "StackedGradient",
    "hessian_products",
    "mean_gradient",
    "per_sample_gradients",
]
