"""Estimates of what an operator is, from products with it: trace, diagonal, norm, spectrum."""

from hessops.estimators.density import SpectralDensity
from hessops.estimators.diagonal import diagonal
from hessops.estimators.eigenpairs import Eigenpairs, eigenpairs
from hessops.estimators.estimate import Estimate
from hessops.estimators.logdet import logdet
from hessops.estimators.norm import norm
from hessops.estimators.spectrum import spectral_density
from hessops.estimators.trace import trace

__all__ = [
    "Eigenpairs",
    "Estimate",
    "SpectralDensity",
    "diagonal",
    "eigenpairs",
    "logdet",
    "norm",
    "spectral_density",
    "trace",
]
