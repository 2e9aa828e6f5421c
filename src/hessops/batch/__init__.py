"""Batch operations, and how their values are averaged over the data."""

from hessops.batch.averaging import Averaging, ChunkAveraging, PointAveraging
from hessops.batch.gauss_newton import (
    GaussNewtonBatchOperation,
    GeneralizedGaussNewtonBatchOperation,
)
from hessops.batch.hessian import HessianBatchOperation
from hessops.batch.inverse_harmonic_mean import InverseHarmonicMeanBatchOperation
from hessops.batch.model import ModelBatchOperation
from hessops.batch.operation import BatchOperation

__all__ = [
    "Averaging",
    "BatchOperation",
    "ChunkAveraging",
    "GaussNewtonBatchOperation",
    "GeneralizedGaussNewtonBatchOperation",
    "HessianBatchOperation",
    "InverseHarmonicMeanBatchOperation",
    "ModelBatchOperation",
    "PointAveraging",
]
