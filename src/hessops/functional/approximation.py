"""Approximations of low rank: dominant eigenpairs and Nyström sketches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    IndefiniteSketchWarning,
    NonFiniteProductError,
    ShapeError,
    StructureError,
)
from hessops.functional.eigenpairs import (
    EigenProblem,
    VectorProduct,
    cupy_modules,
    largest_eigenpairs,
)
from hessops.functional.low_rank import LowRankProductRepresentation
from hessops.randomness import resolved_generator, standard_normal
from hessops.validation import checked_count, checked_number, resolved_device

ShiftFunction = Callable[[Tensor], Tensor]
CPU = torch.device("cpu")


class Operator(Protocol):
    """What of an operator is needed here."""

    @property
    def input_size(self) -> int:
        """P."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""

    @property
    def device(self) -> torch.device:
        """Where products are computed."""

    def apply(self, tensor: Tensor) -> Tensor:
        """Products with a vector or with rows."""


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
        operator.apply,
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


def randomized_nystroem_approximation(
    mat_mat_prod: Tensor | Callable[[Tensor], Tensor],
    input_dim: int,
    rank: int,
    input_type: torch.dtype,
    shift_func: ShiftFunction | None = None,
    mat_vec_device: torch.device | str = CPU,
    *,
    generator: torch.Generator | None = None,
) -> LowRankProductRepresentation:
    r"""The randomized Nyström approximation of a positive semi-definite matrix.

    .. math:: A \approx (A\Omega)(\Omega^\top A \Omega)^\dagger (A\Omega)^\top = U \Sigma U^\top

    with Ω Gaussian and orthonormalised, stabilised by a shift ν (Frangella, Tropp & Udell 2023,
    Algorithm 2.1): Y = AΩ + νΩ, C = chol(ΩᵀY), the singular values σ of YC⁻¹, Σ = max(σ² − ν, 0).

    A network's Hessian is seldom positive semi-definite, and the formula then divides by Ritz
    values of either sign. Where a Ritz value is negative beyond rounding, a warning gives it, and
    the result is instead the positive part of A on the range of the sketch, :math:`U
    \max(U^\top A U, 0) U^\top` with U an orthonormal basis of AΩ, at the price of a second product;
    `LowRankProductRepresentation.clipped` says so.

    Args:
        mat_mat_prod: A as a tensor ``(P, P)``, or the map from columns ``(P, r)`` to A times them.
        input_dim: P.
        rank: r, the number of columns of Ω; P where it is larger.
        input_type: float32 or float64, the dtype of the columns.
        shift_func: From AΩ to ν; ``None`` is √P·ε·‖AΩ‖_F with ε the precision of `input_type`.
        mat_vec_device: Where the columns are handed to `mat_mat_prod` and the result lies.
        generator: Draws Ω; without one, `torch.manual_seed` decides.

    Returns:
        Σ ``(r,)`` in descending order and U ``(P, r)`` with orthonormal columns.

    Raises:
        ShapeError: A matrix or product of another shape.
        ArgumentError: A rank below 1, or a negative shift.
        StructureError: ΩᵀAΩ is not symmetric, or the product is of another dtype.
        NonFiniteProductError: NaN or infinity in the product.

    Example:
        >>> import torch
        >>> from hessops.functional import randomized_nystroem_approximation
        >>> A = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0], dtype=torch.float64))
        >>> sketch = randomized_nystroem_approximation(A, 4, rank=2, input_type=torch.float64)
        >>> bool((sketch.to_dense() - A).abs().max() < 1e-6), sketch.clipped
        (True, False)
    """
    size = checked_count(input_dim, "input_dim")
    sketch_size = min(checked_count(rank, "rank"), size)
    if input_type not in (torch.float32, torch.float64):
        raise ArgumentError(f"input_type must be torch.float32 or torch.float64, got {input_type}")
    device = resolved_device(mat_vec_device)
    product = _columns_product(mat_mat_prod, size, device)
    source = resolved_generator(generator)
    drawn = standard_normal((size, sketch_size), source, dtype=input_type, device=device)
    basis, _ = torch.linalg.qr(drawn)
    image = product(basis)
    core = basis.T @ image
    _require_symmetric_core(core, image)
    core = (core + core.T) / 2
    shift = _shift(image, shift_func)
    if not image.any():
        return LowRankProductRepresentation(image.new_zeros(sketch_size), basis)
    smallest = torch.linalg.eigvalsh(core)[0].item()
    noise = size**0.5 * torch.finfo(input_type).eps * image.norm().item()
    if smallest < -max(10 * noise, shift):
        warnings.warn(
            f"the matrix is not positive semi-definite: its sketch has the negative Ritz value "
            f"{smallest:.3e} (the largest product norm is {_largest_norm(image):.3e}); the "
            "approximation is of its positive part on the sketch. Sketch a Gauss-Newton matrix, or "
            "shift the operator, for one of the whole",
            IndefiniteSketchWarning,
            stacklevel=2,
        )
        return _positive_part(product, image)
    # A negative Ritz value within rounding must not stop the Cholesky factorisation.
    shift = max(shift, -2 * smallest, torch.finfo(input_type).tiny)
    return _stabilised(basis, image, core, shift)


def _columns_product(
    mat_mat_prod: Tensor | Callable[[Tensor], Tensor], size: int, device: torch.device
) -> Callable[[Tensor], Tensor]:
    if isinstance(mat_mat_prod, Tensor):
        matrix = mat_mat_prod
        if matrix.shape != (size, size):
            raise ShapeError(
                f"mat_mat_prod has shape {tuple(matrix.shape)}, expected ({size}, {size})"
            )
        return _checked(lambda columns: matrix.to(columns) @ columns, device)
    if not callable(mat_mat_prod):
        raise ArgumentTypeError(
            f"mat_mat_prod must be a tensor or callable, got {type(mat_mat_prod).__name__}"
        )
    return _checked(mat_mat_prod, device)


def _checked(
    product: Callable[[Tensor], Tensor], device: torch.device
) -> Callable[[Tensor], Tensor]:
    def checked(columns: Tensor) -> Tensor:
        image = product(columns).detach()
        if image.shape != columns.shape:
            raise ShapeError(
                f"mat_mat_prod maps columns of shape {tuple(columns.shape)} to {tuple(image.shape)}"
            )
        if image.dtype != columns.dtype:
            raise StructureError(f"mat_mat_prod maps {columns.dtype} to {image.dtype}")
        if not image.isfinite().all():
            raise NonFiniteProductError("mat_mat_prod returned NaN or infinite values")
        return image.to(device)

    return checked


def _require_symmetric_core(core: Tensor, image: Tensor) -> None:
    asymmetry = (core - core.T).norm().item()
    tolerance = 1e-6 if core.dtype == torch.float64 else 1e-2
    if asymmetry > tolerance * image.norm().item():
        raise StructureError(
            f"the matrix is not symmetric: ΩᵀAΩ differs from its transpose by {asymmetry:.1e}, "
            f"with ‖AΩ‖ = {image.norm().item():.1e}"
        )


def _shift(image: Tensor, shift_func: ShiftFunction | None) -> float:
    if shift_func is None:
        epsilon = torch.finfo(image.dtype).eps
        return float(len(image) ** 0.5 * epsilon * image.norm().item())
    return checked_number(shift_func(image), "the value of shift_func", minimum=0)


def _largest_norm(columns: Tensor) -> float:
    return float(columns.norm(dim=0).max().item())


def _stabilised(
    basis: Tensor, image: Tensor, core: Tensor, shift: float
) -> LowRankProductRepresentation:
    shifted = image + shift * basis
    identity = torch.eye(len(core), dtype=core.dtype, device=core.device)
    factor = torch.linalg.cholesky(core + shift * identity, upper=True)
    scaled = torch.linalg.solve_triangular(factor, shifted, upper=True, left=False)
    vectors, singular_values, _ = torch.linalg.svd(scaled, full_matrices=False)
    values = (singular_values.square() - shift).clamp(min=0)
    return LowRankProductRepresentation(values, vectors)


def _positive_part(
    product: Callable[[Tensor], Tensor], image: Tensor
) -> LowRankProductRepresentation:
    basis, _ = torch.linalg.qr(image)
    core = basis.T @ product(basis)
    values, rotation = torch.linalg.eigh((core + core.T) / 2)
    return LowRankProductRepresentation(
        values.clamp(min=0).flip(0), (basis @ rotation).flip(1).contiguous(), clipped=True
    )


def operator_nystroem_approximation(
    operator: Operator,
    rank: int,
    shift_func: ShiftFunction | None = None,
    *,
    generator: torch.Generator | None = None,
) -> LowRankProductRepresentation:
    """The randomized Nyström approximation of an operator, by one product with all columns.

    Args:
        operator: Any symmetric `hessops.TensorOperator` of float32 or float64.
        rank: Number of columns of the sketch.
        shift_func: See `randomized_nystroem_approximation`.
        generator: Draws the sketch.

    Returns:
        Σ ``(r,)`` and U ``(P, r)`` of the operator's dtype and device.

    Raises:
        HessopsError: As of `randomized_nystroem_approximation`.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator
        >>> from hessops.functional import operator_nystroem_approximation
        >>> A = DiagonalOperator(torch.tensor([4.0, 1.0, 0.0, 0.0]))
        >>> operator_nystroem_approximation(A, rank=2).eigen_vals.round(decimals=3)
        tensor([4., 1.])
    """
    return randomized_nystroem_approximation(
        lambda columns: operator.apply(columns.T).T,
        operator.input_size,
        rank,
        operator.dtype,
        shift_func,
        operator.device,
        generator=generator,
    )
