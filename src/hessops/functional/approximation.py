"""Approximations of low rank by dominant eigenpairs."""

from __future__ import annotations

import torch

from hessops.errors import ArgumentError, ShapeError
from hessops.functional.eigenpairs import (
    EigenProblem,
    VectorProduct,
    cupy_modules,
    largest_eigenpairs,
)
from hessops.functional.low_rank import LowRankProductRepresentation, Operator
from hessops.randomness import resolved_generator
from hessops.validation import checked_count, checked_number, resolved_device

CPU = torch.device("cpu")


def lanczos_low_rank_hessian_approx(
    hessian_vp: VectorProduct,
    matrix_shape: tuple[int, int],
    hessian_perturbation: float = 0.0,
    rank_estimate: int = 10,
    krylov_dimension: int | None = None,
    tol: float = 1e-6,
    max_iter: int | None = None,
    device: torch.device | str | None = None,
    eigen_computation_on_gpu: bool = False,
    torch_dtype: torch.dtype | None = None,
    *,
    generator: torch.Generator | None = None,
) -> LowRankProductRepresentation:
    r"""The eigenpairs of largest absolute value of a symmetric matrix known by its products.

    .. math:: A + \varepsilon I \approx V D V^\top, \qquad V^\top V = I

    by the implicitly restarted method of Lanczos: ARPACK through scipy (Lehoucq, Sorensen & Yang
    1998), or cupy's solver without copies through the host.

    Args:
        hessian_vp: v ↦ Av for a tensor ``(P,)`` of `torch_dtype` on `device`.
        matrix_shape: ``(P, P)``.
        hessian_perturbation: ε, part of the eigenvalues that are returned.
        rank_estimate: Number of eigenpairs; all P where it is not smaller.
        krylov_dimension: Vectors of the Krylov basis; ``None`` is min(P, max(2·rank+1, 20)).
        tol: Relative accuracy of the eigenvalues; 0 is machine precision.
        max_iter: Most restarts; ``None`` is 10·P.
        device: Where products are computed and the result lies; ``None`` is the CPU.
        eigen_computation_on_gpu: Uses cupy; needs a CUDA `device`.
        torch_dtype: float32 or float64; ``None`` is torch's default dtype.
        generator: Draws the starting vector; without one, `torch.manual_seed` decides.

    Returns:
        D ``(r,)`` in descending absolute value, and V ``(P, r)``. Where the iterations ran out,
        only the pairs that converged, with a `ConvergenceWarning` that says how many.

    Raises:
        ShapeError: `matrix_shape` is not square.
        ArgumentError: A negative `tol`, a rank below 1, a Krylov dimension not above the rank, or
            ``eigen_computation_on_gpu`` without a CUDA `device`.
        DtypeError: Half precision.
        StructureError: The matrix is not symmetric.
        NonFiniteProductError: A product is NaN or infinite.
        ImportError: ``eigen_computation_on_gpu`` without cupy.

    Example:
        >>> import torch
        >>> from hessops.functional import lanczos_low_rank_hessian_approx
        >>> diagonal = torch.arange(-3.0, 27.0)
        >>> approximation = lanczos_low_rank_hessian_approx(
        ...     lambda v: diagonal * v, (30, 30), hessian_perturbation=1.0, rank_estimate=2
        ... )
        >>> approximation.eigen_vals.round(decimals=3)
        tensor([27., 26.])
    """
    rows, columns = matrix_shape
    if rows != columns:
        raise ShapeError(f"matrix_shape must be square, got {tuple(matrix_shape)}")
    if eigen_computation_on_gpu:
        _require_gpu(device)
    perturbation = checked_number(hessian_perturbation, "hessian_perturbation")
    checked_count(rank_estimate, "rank_estimate")
    if krylov_dimension is not None and krylov_dimension <= rank_estimate:
        raise ArgumentError(
            f"krylov_dimension must be above rank_estimate={rank_estimate}, got {krylov_dimension}"
        )
    problem = EigenProblem(
        product=lambda v: hessian_vp(v) + perturbation * v if perturbation else hessian_vp(v),
        size=checked_count(rows, "matrix_shape"),
        rank=rank_estimate,
        krylov_dimension=krylov_dimension,
        tol=checked_number(tol, "tol", minimum=0),
        max_iter=None if max_iter is None else checked_count(max_iter, "max_iter"),
        dtype=torch_dtype or torch.get_default_dtype(),
        device=CPU if device is None else resolved_device(device),
    )
    source = resolved_generator(generator)
    values, vectors = largest_eigenpairs(problem, source, on_gpu=eigen_computation_on_gpu)
    return LowRankProductRepresentation(values, vectors)


def _require_gpu(device: torch.device | str | None) -> None:
    advice = "eigen_computation_on_gpu=True needs device to be a CUDA device"
    if device is None:
        raise ArgumentError(f"{advice}, got None")
    cupy_modules()
    if torch.device(device).type != "cuda":
        raise ArgumentError(f"{advice}, got {device}")


# The name under which pyDVL has it.
lanzcos_low_rank_hessian_approx = lanczos_low_rank_hessian_approx


def operator_spectral_approximation(
    operator: Operator,
    rank: int = 10,
    krylov_dimension: int | None = None,
    tol: float = 1e-6,
    max_iter: int | None = None,
    eigen_computation_on_gpu: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> LowRankProductRepresentation:
    """The eigenpairs of largest absolute value of a symmetric operator.

    Args:
        operator: Any symmetric `hessops.TensorOperator` of float32 or float64.
        rank: Number of eigenpairs.
        krylov_dimension: See `lanczos_low_rank_hessian_approx`, as for the other arguments.
        tol: Relative accuracy of the eigenvalues.
        max_iter: Most restarts.
        eigen_computation_on_gpu: Uses cupy; needs an operator on a CUDA device.
        generator: Draws the starting vector.

    Returns:
        D ``(r,)`` and V ``(P, r)`` of the operator's dtype and device.

    Raises:
        HessopsError: As of `lanczos_low_rank_hessian_approx`.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator
        >>> from hessops.functional import operator_spectral_approximation
        >>> A = DiagonalOperator(torch.arange(30.0))
        >>> operator_spectral_approximation(A, rank=2).eigen_vals.round(decimals=3)
        tensor([29., 28.])
    """
    return lanczos_low_rank_hessian_approx(
        operator.linearize().apply,
        (operator.input_size, operator.input_size),
        rank_estimate=rank,
        krylov_dimension=krylov_dimension,
        tol=tol,
        max_iter=max_iter,
        device=operator.device,
        eigen_computation_on_gpu=eigen_computation_on_gpu,
        torch_dtype=operator.dtype,
        generator=generator,
    )
