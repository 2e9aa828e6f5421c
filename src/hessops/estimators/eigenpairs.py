"""Eigenpairs at the ends of the spectrum of any symmetric operator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from hessops.errors import ArgumentError, ConvergenceWarning
from hessops.estimators.products import (
    CountedProducts,
    checked_operator,
    counted_products,
    require_symmetric,
)
from hessops.functional.eigenpairs import (
    EigenProblem,
    SpectrumEnd,
    VectorProduct,
    arpack_eigenpairs,
    cupy_eigenpairs,
    cupy_modules,
    lobpcg_eigenpairs,
)
from hessops.functional.krylov import ritz_pairs
from hessops.isolation import isolated
from hessops.operators.base import TensorOperator
from hessops.operators.inverse import default_rtol
from hessops.printed import Node, Printed, counted
from hessops.randomness import resolved_generator
from hessops.validation import checked_count, checked_number
from hessops.warn import warn

Which = Literal["largest", "smallest", "both", "magnitude"]
EigenMethod = Literal["arpack", "lobpcg"]

# Steps of Lanczos that find ‖A‖: from a random vector within a quarter of it on average, for n up
# to a million and whatever the spectrum (Kuczyński & Woźniakowski 1992, Theorem 3.2).
NORM_STEPS = 10
# Most restarts of ARPACK, or steps of LOBPCG, unless said otherwise.
MOST_ITERATIONS = 1000
# Residuals below this multiple of eps·‖A‖ are rounding.
ROUNDING_FACTOR = 100
# What is added to the eigenvalues of A/‖A‖, so that the ones that are sought are far from zero.
_SHIFTS: dict[SpectrumEnd, float] = {"LM": 0.0, "LA": 2.0, "SA": -2.0, "BE": 2.0}
# LOBPCG searches a space three times as large as its block, and needs more room around it.
LOBPCG_ROOM = 5
# ARPACK takes some ten products for each pair, one by one: as many as the matrix has columns, which
# cost less, being multiplied together.
ARPACK_ROOM = 10


@dataclass(frozen=True, eq=False, repr=False)
class Eigenpairs(Printed):
    r"""Approximate eigenvalues and eigenvectors of a symmetric operator.

    Attributes:
        values: :math:`\lambda_i`, ``(k,)`` in descending order, the Rayleigh quotients of the
            vectors.
        vectors: Unit vectors :math:`v_i` as rows, ``(k, n)``, of the operator's dtype.
        residual_norms: The true :math:`\lVert A v_i - \lambda_i v_i \rVert`, ``(k,)``. Within this
            distance of each value there is an eigenvalue.
        num_products: Products with the operator that were computed.

    Example:
        >>> import torch
        >>> from hessops.estimators import Eigenpairs
        >>> values = torch.tensor([3.0, 2.0])
        >>> Eigenpairs(values, torch.eye(2), torch.zeros(2), num_products=2)
        Eigenpairs(2 of 2, from 3 down to 2, residual norms <= 0, 2 products)
    """

    values: Tensor
    vectors: Tensor
    residual_norms: Tensor
    num_products: int

    def _node(self) -> Node:
        count, size = self.vectors.shape
        products = counted(self.num_products, "product")
        if count == 0:
            return Node(f"Eigenpairs(none of {size}, {products})")
        ends = f"from {self.values[0].item():.4g} down to {self.values[-1].item():.4g}"
        residual = f"residual norms <= {self.residual_norms.max().item():.1g}"
        return Node(f"Eigenpairs({count} of {size}, {ends}, {residual}, {products})")

    def _at(self, positions: Tensor) -> Eigenpairs:
        return replace(
            self,
            values=self.values[positions],
            vectors=self.vectors[positions],
            residual_norms=self.residual_norms[positions],
        )


def eigenpairs(
    operator: TensorOperator,
    k: int = 6,
    which: Which = "largest",
    method: EigenMethod = "arpack",
    *,
    tol: float | None = None,
    max_iter: int | None = None,
    krylov_dimension: int | None = None,
    eigen_computation_on_gpu: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Eigenpairs:
    r"""Eigenpairs at the ends of the spectrum, :math:`A v_i = \lambda_i v_i`.

    ``"arpack"`` is the implicitly restarted method of Lanczos (Lehoucq, Sorensen & Yang 1998), one
    product at a time. ``"lobpcg"`` (Knyazev 2001) advances all vectors together, with one pass over
    the data for all of them; it takes more products, and finds copies of a multiple eigenvalue.
    Both are scipy's. A pair has converged where its residual norm is at most
    ``tol`` :math:`\lVert A \rVert`, with the norm from 10 steps of Lanczos, which are counted; the
    problem is shifted for it, so that eigenvalues near zero are as well had as others. Values and
    residuals are computed anew at the end.

    Of a multiple eigenvalue, or of several closer together than the tolerance, a Krylov method can
    miss copies, and return the next eigenvalue in their place, with a residual that says nothing of
    it: ARPACK often does, of the many zeros of a Gauss-Newton matrix for one, and LOBPCG seldom for
    up to k of them. Where n is at most 10k (less than 5k for LOBPCG; k itself, where the Krylov
    dimension is given), the matrix is decomposed by `torch.linalg.eigh`, which misses none.

    Args:
        operator: A, any symmetric operator of float32 or float64. Where symmetry is unknown, two
            products test it.
        k: Number of pairs; n where it is larger.
        which: ``"largest"`` or ``"smallest"``, signs included; ``"both"``, half from each end and
            the odd one from the upper; or ``"magnitude"``, the largest in absolute value.
        method: ``"arpack"`` or ``"lobpcg"``.
        tol: Relative accuracy; ``None`` is 1e-7 in float64 and 1e-4 in float32, and 0 is what the
            dtype allows.
        max_iter: Most restarts of ARPACK or steps of LOBPCG; ``None`` is min(10·n, 1000).
        krylov_dimension: Vectors of ARPACK's basis; ``None`` is min(n, max(2·k+1, 20)).
        eigen_computation_on_gpu: Uses cupy's Lanczos; needs an operator on a CUDA device.
        generator: Draws the starting vectors; without one, `torch.manual_seed` decides.
        progress: Shows a progress bar that counts products.

    Returns:
        The pairs of the operator's dtype on its device. Those that did not converge are left out,
        with a `ConvergenceWarning` that says how many.

    Raises:
        ArgumentTypeError: `operator` is no operator, or a number is none.
        ArgumentError: An unknown `which` or `method`; `k` or `max_iter` below 1; a negative `tol`;
            a Krylov dimension not above k; `eigen_computation_on_gpu` with LOBPCG or without CUDA.
        DtypeError: Half precision.
        StructureError: A is not symmetric.
        MemoryLimitError: The matrix that would be decomposed does not fit.
        NonFiniteProductError: A product is NaN or infinite.
        ImportError: `eigen_computation_on_gpu` without cupy.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator
        >>> from hessops.estimators import eigenpairs
        >>> A = DiagonalOperator(torch.arange(-10.0, 30.0))
        >>> pairs = eigenpairs(A, k=4, which="both")
        >>> pairs.values.round(decimals=3)
        tensor([ 29.,  28.,  -9., -10.])
        >>> bool((pairs.vectors @ A @ pairs.vectors.T - pairs.values.diag()).norm() < 1e-3)
        True
    """
    checked_operator(operator, "eigenpairs")
    settings = _Settings(
        which,
        method,
        default_rtol(operator.dtype) if tol is None else checked_number(tol, "tol", minimum=0),
        None if max_iter is None else checked_count(max_iter, "max_iter"),
        krylov_dimension,
        eigen_computation_on_gpu,
    )
    count = min(checked_count(k, "k"), operator.input_size)
    settings.require_sense(operator, count)
    source = resolved_generator(generator)
    with (
        isolated(operator.device),
        counted_products(operator, "eigenpairs", progress=progress) as product,
    ):
        require_symmetric(product, "eigenpairs", source)
        if settings.is_dense(count, operator.input_size):
            vectors, scale = _dense_vectors(product, count, which), None
        else:
            vectors, scale = _krylov_vectors(product, count, settings, source)
        pairs = _measured(product, vectors)
        pairs = pairs._at(_chosen(pairs.values, count, which))
    if scale is None:
        return pairs
    return _converged(pairs, count, settings, scale)


@dataclass(frozen=True)
class _Settings:
    """How eigenpairs are computed; see `eigenpairs`."""

    which: Which
    method: EigenMethod
    tol: float
    max_iter: int | None
    krylov_dimension: int | None
    on_gpu: bool

    def require_sense(self, operator: TensorOperator, count: int) -> None:
        """Raises where they do not fit the operator or each other."""
        for name, value, known in (
            ("which", self.which, get_args(Which)),
            ("method", self.method, get_args(EigenMethod)),
        ):
            if value not in known:
                raise ArgumentError(f"{name} must be one of {known}, got {value!r}")
        if self.krylov_dimension is not None:
            checked_count(self.krylov_dimension, "krylov_dimension")
            if self.krylov_dimension <= count:
                raise ArgumentError(
                    f"krylov_dimension must be above k={count}, got {self.krylov_dimension}"
                )
        if self.on_gpu:
            if self.method == "lobpcg":
                raise ArgumentError(
                    "eigen_computation_on_gpu=True is cupy's method of Lanczos; use "
                    "method='arpack' with it"
                )
            if operator.device.type != "cuda":
                raise ArgumentError(
                    "eigen_computation_on_gpu=True needs an operator on a CUDA device, got one on "
                    f"{operator.device}"
                )
            cupy_modules()

    def is_dense(self, count: int, size: int) -> bool:
        """Whether the matrix is decomposed: Krylov methods need room beside the pairs."""
        if self.method == "lobpcg":
            return size < LOBPCG_ROOM * count
        is_as_dear = self.krylov_dimension is None and size <= ARPACK_ROOM * count
        return count >= size or is_as_dear

    def runs(self, count: int) -> list[tuple[SpectrumEnd, int]]:
        """The ends of the spectrum that the method is run for one after the other."""
        if self.which == "largest" or (self.which == "both" and count == 1):
            return [("LA", count)]
        if self.which == "smallest":
            return [("SA", count)]
        if self.method == "lobpcg" and self.which == "magnitude":
            # The largest in absolute value are among those of both ends.
            return [("LA", count), ("SA", count)]
        if self.which == "magnitude":
            return [("LM", count)]
        if self.method == "lobpcg" or self.on_gpu:
            return [("LA", count - count // 2), ("SA", count // 2)]
        return [("BE", count)]

    def accuracy(self, dtype: torch.dtype) -> float:
        """Residual norm at which a pair has converged, relative to ‖A‖."""
        return max(self.tol, ROUNDING_FACTOR * torch.finfo(dtype).eps)


def _krylov_vectors(
    product: CountedProducts, count: int, settings: _Settings, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Approximate eigenvectors as rows, and ‖A‖ or a little less."""
    operator = product.operator
    size, dtype, device = operator.input_size, operator.dtype, operator.device
    norm = _norm(product, generator)
    units = torch.eye(count, size, dtype=dtype, device=device)
    if norm == 0:
        # Every vector is an eigenvector of zero, with which Krylov methods cannot begin.
        return units, norm
    found = units[:0]
    for end, number in settings.runs(count):
        problem = EigenProblem(
            product=partial(_transformed, product, norm, _SHIFTS[end], found),
            size=size,
            rank=number,
            krylov_dimension=settings.krylov_dimension,
            # ARPACK's is relative to the eigenvalue, which is about 3 at most.
            tol=settings.tol / 3,
            max_iter=settings.max_iter or min(10 * size, MOST_ITERATIONS),
            dtype=dtype,
            device=device,
            end=end,
        )
        found = torch.cat([found, _run(problem, settings, generator)])
    return found, norm


def _run(problem: EigenProblem, settings: _Settings, generator: torch.Generator) -> Tensor:
    """Eigenvectors of one end of the spectrum, as rows."""
    if settings.method == "lobpcg":
        return lobpcg_eigenpairs(problem, generator, settings.accuracy(problem.dtype))[1].T
    if settings.on_gpu:
        return cupy_eigenpairs(problem, generator, *cupy_modules())[1].T
    return arpack_eigenpairs(problem, generator)[1].T


def _transformed(
    product: VectorProduct, norm: float, shift: float, found: Tensor, tensor: Tensor
) -> Tensor:
    """(A/‖A‖ + shift·I + 4VᵀV) times vectors, for the rows V of what was found at the other end.

    The solvers square what they are given, which overflows or underflows unless it is scaled. The
    shift takes all eigenvalues away from zero, where an error relative to them could not be met;
    the last term takes those that were found out of the way.
    """
    image = torch.add(product(tensor) / norm, tensor, alpha=shift)
    return image + 4 * ((tensor @ found.T) @ found) if len(found) else image


def _norm(product: CountedProducts, generator: torch.Generator) -> float:
    """‖A‖ or a little less, by a few steps of Lanczos."""
    operator = product.operator
    pairs = ritz_pairs(
        lambda vector: product(vector.to(operator.dtype)).double(),
        operator.input_size,
        max_iter=NORM_STEPS,
        tol=0.0,
        generator=generator,
        device=operator.device,
        with_vectors=False,
    )
    return float(pairs.values.abs().max().item())


def _dense_vectors(product: CountedProducts, count: int, which: Which) -> Tensor:
    """The eigenvectors that were asked for, as rows."""
    operator = product.operator
    matrix = operator.to_dense().double()
    product.work(operator.input_size)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    descending: Tensor = vectors.T.flip(0)
    return descending[_chosen(values.flip(0), count, which)].to(operator.dtype)


def _measured(product: CountedProducts, vectors: Tensor) -> Eigenpairs:
    """Rayleigh quotients and true residuals of the rows, in descending order."""
    rows = vectors.double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    units = rows.to(vectors.dtype)
    images = product(units).double()
    values = (rows * images).sum(dim=1)
    residuals = (images - values.unsqueeze(1) * rows).norm(dim=1)
    order = values.argsort(descending=True, stable=True)
    pairs = Eigenpairs(
        values.to(vectors.dtype), units, residuals.to(vectors.dtype), num_products=product.count
    )
    return pairs._at(order)


def _chosen(values: Tensor, count: int, which: Which) -> Tensor:
    """The places of those that were asked for, of values in descending order."""
    order = torch.arange(len(values), device=values.device)
    lower = count // 2
    if which == "largest":
        order = order[:count]
    elif which == "smallest":
        order = order[-count:]
    elif which == "magnitude":
        order = values.abs().argsort(descending=True, stable=True)[:count].sort().values
    elif len(values) > count:
        order = torch.cat([order[: count - lower], order[len(values) - lower :]])
    return order


def _converged(pairs: Eigenpairs, count: int, settings: _Settings, scale: float) -> Eigenpairs:
    """The pairs that converged, with a warning where some did not."""
    values = pairs.values.double().abs()
    norm = max(scale, values.max().item()) if len(values) else scale
    # Twice as much: methods estimate their residuals.
    allowed = 2 * settings.accuracy(pairs.values.dtype) * norm
    kept = (pairs.residual_norms <= allowed).nonzero().squeeze(1)
    if len(kept) < count:
        warn(
            f"{len(kept)} of {count} eigenpairs converged to tol={settings.tol:g}; only those are "
            "returned. Raise max_iter or krylov_dimension, loosen tol, or take the other method",
            ConvergenceWarning,
        )
    return pairs._at(kept)
