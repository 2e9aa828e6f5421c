"""Iterative solvers, as inverse operators."""

from hessops.solvers.conjugate_gradient import CgOperator
from hessops.solvers.krylov import KrylovOperator
from hessops.solvers.lissa import LissaOperator
from hessops.solvers.minres import MinresOperator
from hessops.solvers.refinement import IterativeRefinementOperator

__all__ = [
    "CgOperator",
    "IterativeRefinementOperator",
    "KrylovOperator",
    "LissaOperator",
    "MinresOperator",
]
