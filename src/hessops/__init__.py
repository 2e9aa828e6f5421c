"""Curvature of PyTorch models as linear operators: products, inverses, and what they tell.

A Hessian of a trained network is a matrix nobody can store. Here it, its relatives and their
inverses are operators that stream over a ``DataLoader``, act on flat tensors or on dictionaries of
tensors, and can be added, shifted, composed and inverted.
"""

from hessops.batch import (
    Averaging,
    BatchOperation,
    ChunkAveraging,
    GaussNewtonBatchOperation,
    GeneralizedGaussNewtonBatchOperation,
    HessianBatchOperation,
    InverseHarmonicMeanBatchOperation,
    ModelBatchOperation,
    PointAveraging,
)
from hessops.functional import LowRankProductRepresentation
from hessops.objective import Objective
from hessops.operators import (
    BatchOperator,
    BlockDiagonalOperator,
    ClosedFormInverse,
    CurvatureOperator,
    DiagonalOperator,
    DirectInverse,
    DirectSolveOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    IdentityOperator,
    InverseHarmonicMeanOperator,
    InverseOperator,
    LowRankOperator,
    LowRankProductOperator,
    MatrixOperator,
    Solution,
    SolveStatus,
    TensorDictOperator,
    TensorOperator,
)
from hessops.solvers import CgOperator
from hessops.space import ParameterSpace
from hessops.streaming import Batch, BatchStream

__version__ = "0.1.0"

__all__ = [
    "Averaging",
    "Batch",
    "BatchOperation",
    "BatchOperator",
    "BatchStream",
    "BlockDiagonalOperator",
    "CgOperator",
    "ChunkAveraging",
    "ClosedFormInverse",
    "CurvatureOperator",
    "DiagonalOperator",
    "DirectInverse",
    "DirectSolveOperator",
    "GaussNewtonBatchOperation",
    "GaussNewtonOperator",
    "GeneralizedGaussNewtonBatchOperation",
    "GeneralizedGaussNewtonOperator",
    "HessianBatchOperation",
    "HessianOperator",
    "IdentityOperator",
    "InverseHarmonicMeanBatchOperation",
    "InverseHarmonicMeanOperator",
    "InverseOperator",
    "LowRankOperator",
    "LowRankProductOperator",
    "LowRankProductRepresentation",
    "MatrixOperator",
    "ModelBatchOperation",
    "Objective",
    "ParameterSpace",
    "PointAveraging",
    "Solution",
    "SolveStatus",
    "TensorDictOperator",
    "TensorOperator",
]
