"""Operators: linear maps, their algebra, and the curvature of models."""

from hessops.operators.algebra import (
    ComposedOperator,
    ScaledOperator,
    ShiftedOperator,
    SumOperator,
    TransposedOperator,
)
from hessops.operators.base import CompositeOperator, TensorDictOperator, TensorOperator
from hessops.operators.curvature import (
    BatchOperator,
    CurvatureOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    InverseHarmonicMeanOperator,
)
from hessops.operators.damping import Damping
from hessops.operators.dense import DirectSolveOperator, MatrixOperator
from hessops.operators.diagonal import (
    BlockDiagonalOperator,
    DiagonalOperator,
    IdentityOperator,
)
from hessops.operators.eigen import EigenOperator
from hessops.operators.eigen_blocks import BlockEigenOperator, KfacInverse
from hessops.operators.inverse import ClosedFormInverse, DirectInverse, InverseOperator
from hessops.operators.kronecker import EkfacOperator, KfacOperator
from hessops.operators.kronecker_file import load_factors
from hessops.operators.low_rank import LowRankOperator, LowRankProductOperator
from hessops.operators.sample_space import SampleSpaceInverse
from hessops.operators.solution import Solution, SolveStatus

__all__ = [
    "BatchOperator",
    "BlockDiagonalOperator",
    "BlockEigenOperator",
    "ClosedFormInverse",
    "ComposedOperator",
    "CompositeOperator",
    "CurvatureOperator",
    "Damping",
    "DiagonalOperator",
    "DirectInverse",
    "DirectSolveOperator",
    "EigenOperator",
    "EkfacOperator",
    "GaussNewtonOperator",
    "GeneralizedGaussNewtonOperator",
    "HessianOperator",
    "IdentityOperator",
    "InverseHarmonicMeanOperator",
    "InverseOperator",
    "KfacInverse",
    "KfacOperator",
    "LowRankOperator",
    "LowRankProductOperator",
    "MatrixOperator",
    "SampleSpaceInverse",
    "ScaledOperator",
    "ShiftedOperator",
    "Solution",
    "SolveStatus",
    "SumOperator",
    "TensorDictOperator",
    "TensorOperator",
    "TransposedOperator",
    "load_factors",
]
