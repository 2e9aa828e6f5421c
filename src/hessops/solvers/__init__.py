"""Iterative solvers, as inverse operators."""

from hessops.solvers.conjugate_gradient import CgOperator
from hessops.solvers.krylov import KrylovOperator
from hessops.solvers.lissa import LissaOperator
from hessops.solvers.minres import MinresOperator

__all__ = ["CgOperator", "KrylovOperator", "LissaOperator", "MinresOperator"]
