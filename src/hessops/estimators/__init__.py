"""Estimates of what an operator is, from products with it: trace, diagonal, norm, spectrum."""

from hessops.estimators.estimate import Estimate

__all__ = ["Estimate"]
