"""Estimates of what an operator is, from products with it: trace, diagonal, norm, spectrum."""

from hessops.estimators.density import SpectralDensity
from hessops.estimators.eigenpairs import Eigenpairs, eigenpairs
from hessops.estimators.estimate import Estimate
from hessops.estimators.logdet import logdet
from hessops.estimators.spectrum import spectral_density

__all__ = [
    "Eigenpairs",
    "Estimate",
    "SpectralDensity",
    "eigenpairs",
    "logdet",
    "spectral_density",
]
