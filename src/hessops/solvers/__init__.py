"""Iterative solvers, as inverse operators."""

from hessops.solvers.conjugate_gradient import CgOperator

__all__ = ["CgOperator"]
