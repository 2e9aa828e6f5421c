"""Eigenpairs of symmetric maps by ARPACK and LOBPCG (scipy), or on the GPU (cupy)."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh, lobpcg
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from hessops.errors import (
    ConvergenceWarning,
    DtypeError,
    NonFiniteProductError,
    StructureError,
)
from hessops.functional.checks import excess_asymmetry
from hessops.randomness import standard_normal
from hessops.warn import warn

if TYPE_CHECKING:
    from numpy.typing import NDArray

VectorProduct = Callable[[Tensor], Tensor]
# ARPACK's names: largest magnitude, largest, smallest, both ends (one more from the upper one).
SpectrumEnd = Literal["LM", "LA", "SA", "BE"]
# What LOBPCG says when it stops early or restarts: the residuals of its result tell.
_LOBPCG_REMARKS = "(Exited|Failed|eigh failed|Cholesky has failed)"
# ARPACK continues exhausted Krylov spaces by random vectors; from scipy 1.17 on, ours.
_TAKES_RNG = "rng" in inspect.signature(eigsh).parameters


@dataclass(frozen=True, eq=False)
class EigenProblem:
    """The symmetric eigenproblem of a map that is known by its products.

    Attributes:
        product: v ↦ Av for ``(n,)`` tensors of `dtype` on `device`; LOBPCG gives it ``(k, n)``.
        size: n.
        rank: Number of eigenpairs.
        krylov_dimension: Most vectors of the Krylov basis; ``None`` is min(n, max(2·rank+1, 20)).
        tol: Relative accuracy of the eigenvalues.
        max_iter: Most restarts; ``None`` is 10·n.
        dtype: float32 or float64.
        device: Where products are computed and the result lies.
        end: Which eigenpairs.
    """

    product: VectorProduct
    size: int
    rank: int
    krylov_dimension: int | None
    tol: float
    max_iter: int | None
    dtype: torch.dtype
    device: torch.device
    end: SpectrumEnd = "LM"

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.float64):
            raise DtypeError(
                f"eigenvalues are computed in float32 or float64, got {self.dtype}; convert the "
                "model, or pass torch_dtype="
            )

    def checked_product(self, vector: Tensor) -> Tensor:
        """A times a vector, of the right shape and dtype and finite.

        Raises:
            StructureError: The product has another shape or dtype.
            NonFiniteProductError: It is NaN or infinite.
        """
        result = self.product(vector).detach()
        if result.shape != vector.shape or result.dtype != self.dtype:
            raise StructureError(
                f"hessian_vp maps a vector of shape {tuple(vector.shape)} and {self.dtype} to "
                f"{tuple(result.shape)} and {result.dtype}; pass torch_dtype= for another dtype"
            )
        if not result.isfinite().all():
            raise NonFiniteProductError("hessian_vp returned NaN or infinite values")
        return result.to(self.device)

    @property
    def basis_size(self) -> int:
        """The dimension of the Krylov space."""
        wanted = self.krylov_dimension or max(2 * self.rank + 1, 20)
        return min(self.size, max(wanted, self.rank + 1))

    @property
    def most_restarts(self) -> int:
        """The iteration budget."""
        return self.max_iter or 10 * self.size

    def require_symmetry(self, generator: torch.Generator) -> Tensor:
        """Compares ⟨u, Av⟩ with ⟨Au, v⟩ for two random vectors; returns Au and Av.

        Raises:
            StructureError: They differ.
        """
        probes = self.random_vectors(2, generator)
        products = torch.stack([self.checked_product(probe) for probe in probes])
        asymmetry = excess_asymmetry(probes, products)
        if asymmetry is not None:
            raise StructureError(
                "hessian_vp is not symmetric: ⟨u, Av⟩ and ⟨Au, v⟩ differ by "
                f"{asymmetry:.1e} relative"
            )
        return products

    def random_vectors(self, count: int, generator: torch.Generator) -> Tensor:
        """Normal vectors ``(count, n)``."""
        shape = (count, self.size)
        return standard_normal(shape, generator, dtype=self.dtype, device=self.device)


def largest_eigenpairs(
    problem: EigenProblem, generator: torch.Generator, *, on_gpu: bool = False
) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(r,)`` in descending absolute value, and eigenvectors as columns ``(n, r)``.

    Fewer than `rank` pairs come back, with a warning, where the method stopped before it had all.

    Raises:
        ImportError: ``on_gpu`` without cupy.
        StructureError: The map is not symmetric.
        NonFiniteProductError: A product is NaN or infinite.
    """
    gpu_modules = cupy_modules() if on_gpu else None
    products = problem.require_symmetry(generator)
    # A random vector is mapped to zero by zero only, with which Krylov methods cannot begin.
    if problem.rank < problem.size and not products.any():
        return _pairs_of_zero(problem)
    if problem.rank >= problem.size:
        values, vectors = _dense_eigenpairs(problem)
    elif gpu_modules is not None:
        values, vectors = cupy_eigenpairs(problem, generator, *gpu_modules)
    else:
        values, vectors = arpack_eigenpairs(problem, generator)
    if len(values) < min(problem.rank, problem.size):
        warn(
            f"{len(values)} of {problem.rank} eigenpairs converged to tol={problem.tol:g} within "
            f"max_iter={problem.most_restarts}; only those are returned. Raise max_iter or "
            "krylov_dimension, or loosen tol",
            ConvergenceWarning,
        )
    order = values.abs().argsort(descending=True, stable=True)
    return values[order], vectors[:, order].contiguous()


def _pairs_of_zero(problem: EigenProblem) -> tuple[Tensor, Tensor]:
    vectors = torch.eye(problem.size, problem.rank, dtype=problem.dtype, device=problem.device)
    return vectors.new_zeros(problem.rank), vectors


def _dense_eigenpairs(problem: EigenProblem) -> tuple[Tensor, Tensor]:
    """All of them: Krylov methods need a rank below n."""
    identity = torch.eye(problem.size, dtype=problem.dtype, device=problem.device)
    matrix = torch.stack([problem.checked_product(row) for row in identity])
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values, vectors


def arpack_eigenpairs(problem: EigenProblem, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Those that converged, by the implicitly restarted method of Lanczos; columns ``(n, r)``."""
    numpy_dtype = np.float64 if problem.dtype == torch.float64 else np.float32

    def matvec(array: NDArray[Any]) -> NDArray[Any]:
        vector = torch.from_numpy(np.array(array.reshape(-1), dtype=numpy_dtype))
        return problem.checked_product(vector.to(problem.device)).cpu().numpy()

    linear = LinearOperator((problem.size, problem.size), matvec=matvec, dtype=numpy_dtype)
    start = problem.random_vectors(1, generator)[0].cpu().numpy()
    options: dict[str, Any] = {"rng": np.random.default_rng(generator.initial_seed() % 2**63)}
    try:
        values, vectors = eigsh(
            linear,
            k=problem.rank,
            which=problem.end,
            v0=start,
            ncv=problem.basis_size,
            maxiter=problem.most_restarts,
            tol=problem.tol,
            **(options if _TAKES_RNG else {}),
        )
    except ArpackNoConvergence as stopped:
        values, vectors = stopped.eigenvalues, stopped.eigenvectors
    return (
        torch.from_numpy(np.array(values, dtype=numpy_dtype)).to(problem.device),
        torch.from_numpy(
            np.array(vectors, dtype=numpy_dtype).reshape(problem.size, len(values))
        ).to(problem.device),
    )


def lobpcg_eigenpairs(
    problem: EigenProblem, generator: torch.Generator, accuracy: float
) -> tuple[Tensor, Tensor]:
    """The best that there were, by LOBPCG (Knyazev 2001): all vectors in one product.

    In float64 whatever the dtype of the products: LOBPCG carries the products of its vectors along
    without computing them anew, which in float32 drift apart.

    Args:
        problem: Of one end of the spectrum, ``"LA"`` or ``"SA"``.
        generator: Draws the starting vectors.
        accuracy: Residual norm at which a pair has converged.
    """

    def matmat(columns: NDArray[Any]) -> NDArray[Any]:
        rows = torch.from_numpy(np.array(columns.T, order="C")).to(problem.device, problem.dtype)
        return problem.checked_product(rows).cpu().double().numpy().T

    shape = (problem.size, problem.size)
    linear = LinearOperator(shape, matvec=matmat, matmat=matmat, dtype=np.float64)
    start = problem.random_vectors(problem.rank, generator).T.cpu().double().numpy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _LOBPCG_REMARKS, UserWarning)
        values, vectors = lobpcg(
            linear,
            start,
            tol=accuracy,
            maxiter=problem.most_restarts,
            largest=problem.end == "LA",
        )
    return (
        torch.from_numpy(np.array(values)).to(problem.device, problem.dtype),
        torch.from_numpy(np.array(vectors)).to(problem.device, problem.dtype),
    )


def cupy_modules() -> tuple[ModuleType, ModuleType]:
    """The package cupy and its sparse eigen-solvers.

    Raises:
        ImportError: Cupy is not installed.
    """
    try:
        return importlib.import_module("cupy"), importlib.import_module("cupyx.scipy.sparse.linalg")
    except ImportError as error:
        raise ImportError(
            "eigen_computation_on_gpu=True needs cupy: pip install 'hessops[cupy]', or pass "
            "eigen_computation_on_gpu=False for ARPACK on the CPU"
        ) from error


def cupy_eigenpairs(
    problem: EigenProblem, generator: torch.Generator, cupy: ModuleType, linalg: ModuleType
) -> tuple[Tensor, Tensor]:
    """Those that converged; vectors cross between torch and cupy by DLPack, on the device.

    Of the ends of the spectrum, cupy has all but both at once.
    """

    def matvec(array: Any) -> Any:
        vector = from_dlpack(cupy.ascontiguousarray(array.reshape(-1)))
        return cupy.from_dlpack(problem.checked_product(vector).contiguous())

    with cupy.cuda.Device(problem.device.index or 0):
        shape, dtype = (problem.size, problem.size), _cupy_dtype(cupy, problem.dtype)
        linear = linalg.LinearOperator(shape, matvec=matvec, dtype=dtype)
        values, vectors = linalg.eigsh(
            linear,
            k=problem.rank,
            which=problem.end,
            v0=cupy.from_dlpack(problem.random_vectors(1, generator)[0]),
            ncv=problem.basis_size,
            maxiter=problem.most_restarts,
            tol=problem.tol,
        )
        found = from_dlpack(values).clone(), from_dlpack(vectors).clone()
    return _converged(problem, *found)


def _cupy_dtype(cupy: ModuleType, dtype: torch.dtype) -> Any:
    return cupy.float64 if dtype == torch.float64 else cupy.float32


def _converged(problem: EigenProblem, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs with a small true residual: cupy returns what it has when iterations run out."""
    images = torch.stack([problem.checked_product(v) for v in vectors.T], dim=1)
    residuals = (images - vectors * values).norm(dim=0)
    # A relative error tol of an eigenvalue is a residual of about its square root at most.
    allowed = max(problem.tol, torch.finfo(problem.dtype).eps) ** 0.5
    kept = values.isfinite() & (residuals <= allowed * values.abs().max())
    return values[kept], vectors[:, kept]
