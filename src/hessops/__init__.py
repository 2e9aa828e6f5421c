"""Curvature of PyTorch models as linear operators: products, inverses, and what they tell.

A Hessian of a trained network is a matrix nobody can store. Here it, its relatives and their
inverses are operators that stream over a ``DataLoader``, act on flat tensors or on dictionaries of
tensors, and can be added, shifted, composed and inverted.
"""

import logging as _logging

from hessops import distributed, ihvp
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
from hessops.distributed import DistributedAveraging
from hessops.functional import (
    LowRankProductRepresentation,
    batch_hvp_gen,
    batch_loss_function,
    create_batch_hvp_function,
    create_batch_loss_function,
    create_empirical_loss_function,
    create_hvp_function,
    create_matrix_jacobian_product_function,
    create_per_sample_gradient_function,
    create_per_sample_loss_function,
    create_per_sample_mixed_derivative_function,
    empirical_loss_function,
    gauss_newton,
    get_hvp_function,
    hessian,
    hvp,
    lanczos_low_rank_hessian_approx,
    lanzcos_low_rank_hessian_approx,
    model_hessian_low_rank,
    model_hessian_nystroem_approximation,
    operator_nystroem_approximation,
    operator_spectral_approximation,
    randomized_nystroem_approximation,
)
from hessops.objective import Objective
from hessops.operators import (
    BatchOperator,
    BlockDiagonalOperator,
    BlockEigenOperator,
    ClosedFormInverse,
    CompositeOperator,
    CurvatureOperator,
    Damping,
    DiagonalOperator,
    DirectInverse,
    DirectSolveOperator,
    EigenOperator,
    EkfacOperator,
    GaussNewtonOperator,
    GeneralizedGaussNewtonOperator,
    HessianOperator,
    IdentityOperator,
    InverseHarmonicMeanOperator,
    InverseOperator,
    KfacInverse,
    KfacOperator,
    LowRankOperator,
    LowRankProductOperator,
    MatrixOperator,
    SampleSpaceInverse,
    Solution,
    SolveStatus,
    TensorDictOperator,
    TensorOperator,
    load_factors,
)
from hessops.preconditioners import (
    BlockDiagonalPreconditioner,
    FittedPreconditioner,
    JacobiPreConditioner,
    JacobiPreconditioner,
    NystroemPreConditioner,
    NystroemPreconditioner,
    Preconditioner,
)
from hessops.solvers import (
    CgOperator,
    IterativeRefinementOperator,
    KrylovOperator,
    LissaOperator,
    MinresOperator,
)
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
    "BlockDiagonalPreconditioner",
    "BlockEigenOperator",
    "CgOperator",
    "ChunkAveraging",
    "ClosedFormInverse",
    "CompositeOperator",
    "CurvatureOperator",
    "Damping",
    "DiagonalOperator",
    "DirectInverse",
    "DirectSolveOperator",
    "DistributedAveraging",
    "EigenOperator",
    "EkfacOperator",
    "FittedPreconditioner",
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
    "IterativeRefinementOperator",
    "JacobiPreConditioner",
    "JacobiPreconditioner",
    "KfacInverse",
    "KfacOperator",
    "KrylovOperator",
    "LissaOperator",
    "LowRankOperator",
    "LowRankProductOperator",
    "LowRankProductRepresentation",
    "MatrixOperator",
    "MinresOperator",
    "ModelBatchOperation",
    "NystroemPreConditioner",
    "NystroemPreconditioner",
    "Objective",
    "ParameterSpace",
    "PointAveraging",
    "Preconditioner",
    "SampleSpaceInverse",
    "Solution",
    "SolveStatus",
    "TensorDictOperator",
    "TensorOperator",
    "batch_hvp_gen",
    "batch_loss_function",
    "create_batch_hvp_function",
    "create_batch_loss_function",
    "create_empirical_loss_function",
    "create_hvp_function",
    "create_matrix_jacobian_product_function",
    "create_per_sample_gradient_function",
    "create_per_sample_loss_function",
    "create_per_sample_mixed_derivative_function",
    "distributed",
    "empirical_loss_function",
    "gauss_newton",
    "get_hvp_function",
    "hessian",
    "hvp",
    "ihvp",
    "lanczos_low_rank_hessian_approx",
    "lanzcos_low_rank_hessian_approx",
    "load_factors",
    "model_hessian_low_rank",
    "model_hessian_nystroem_approximation",
    "operator_nystroem_approximation",
    "operator_spectral_approximation",
    "randomized_nystroem_approximation",
]

# A library stays silent until its user asks: without this Python prints warnings of loggers itself.
_logging.getLogger(__name__).addHandler(_logging.NullHandler())

# Modules with public names that are not repeated here; the others are the library's own.
_MODULES = (
    "distributed",
    "errors",
    "estimators",
    "functional",
    "ihvp",
    "influence",
    "plotting",
    "testing",
)


def __dir__() -> list[str]:
    """What is public: the names of `__all__`, and the modules that were imported."""
    imported = {name for name in _MODULES if name in globals()}
    special = {name for name in globals() if name.startswith("__")}
    return sorted({*__all__, *imported, *special})
