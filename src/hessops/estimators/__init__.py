"""Estimates of what an operator is, from products with it: trace, diagonal, norm, spectrum."""

from hessops.estimators.diagonal import diagonal
from hessops.estimators.estimate import Estimate
from hessops.estimators.norm import norm
from hessops.estimators.trace import trace

__all__ = ["Estimate", "diagonal", "norm", "trace"]
