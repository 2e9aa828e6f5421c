"""Nyström sketches: positive semi-definite approximations of low rank from one product."""

from __future__ import annotations

from collections.abc import Callable

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
from hessops.functional.low_rank import LowRankProductRepresentation, Operator
from hessops.functional.precision import powers_of_two
from hessops.randomness import resolved_generator, standard_normal
from hessops.validation import checked_count, checked_number, resolved_device
from hessops.warn import warn

ShiftFunction = Callable[[Tensor], Tensor]
CPU = torch.device("cpu")


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
    sketch = NystroemSketch(
        mat_mat_prod, input_dim, input_type, resolved_device(mat_vec_device), generator
    )
    sketch.grow(checked_count(rank, "rank"))
    return sketch.approximation(shift_func)


class NystroemSketch:
    """Ω and AΩ of a symmetric matrix; more columns can be added without losing the first.

    Args:
        mat_mat_prod: A, see `randomized_nystroem_approximation`, as for the other arguments.
        input_dim: P.
        input_type: float32 or float64.
        device: Where the sketch lies.
        generator: Draws Ω.

    Raises:
        HessopsError: As of `randomized_nystroem_approximation`.

    Example:
        >>> import torch
        >>> from hessops.functional.nystroem import NystroemSketch
        >>> A = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0], dtype=torch.float64))
        >>> sketch = NystroemSketch(A, 4, torch.float64, torch.device("cpu"))
        >>> sketch.grow(1)
        >>> sketch.grow(2)
        >>> sketch.approximation().eigen_vals.round(decimals=2)
        tensor([4., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        mat_mat_prod: Tensor | Callable[[Tensor], Tensor],
        input_dim: int,
        input_type: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> None:
        size = checked_count(input_dim, "input_dim")
        if input_type not in (torch.float32, torch.float64):
            raise ArgumentError(
                f"input_type must be torch.float32 or torch.float64, got {input_type}"
            )
        self._product = _columns_product(mat_mat_prod, size, device)
        self._source = resolved_generator(generator)
        self.basis = torch.zeros(size, 0, dtype=input_type, device=device)
        self.image = self.basis

    @property
    def num_columns(self) -> int:
        """Columns of Ω so far."""
        return self.basis.shape[1]

    def grow(self, num_columns: int) -> None:
        """Adds columns to Ω up to a number, or up to P, by one product with the new ones."""
        size = len(self.basis)
        count = min(num_columns, size) - self.num_columns
        drawn = standard_normal(
            (size, count), self._source, dtype=self.basis.dtype, device=self.basis.device
        )
        # Twice is enough; in a basis that is almost complete, once is not.
        for _ in range(2):
            drawn, _ = torch.linalg.qr(drawn - self.basis @ (self.basis.T @ drawn))
        self.image = torch.cat([self.image, self._product(drawn)], dim=1)
        self.basis = torch.cat([self.basis, drawn], dim=1)

    def approximation(
        self, shift_func: ShiftFunction | None = None
    ) -> LowRankProductRepresentation:
        """What `randomized_nystroem_approximation` returns, from the columns there are."""
        basis = self.basis
        # Scaled by a power of two, so that no norm leaves the range of the dtype.
        scale = powers_of_two(self.image.reshape(1, -1)).item()
        image = self.image / scale
        core = basis.T @ image
        _require_symmetric_core(core, image)
        core = (core + core.T) / 2
        shift = _shift(image, scale, shift_func)
        if not image.any():
            return LowRankProductRepresentation(image.new_zeros(self.num_columns), basis)
        smallest = torch.linalg.eigvalsh(core)[0].item()
        noise = len(basis) ** 0.5 * torch.finfo(basis.dtype).eps * image.norm().item()
        if smallest < -max(10 * noise, shift):
            warn(
                f"the matrix is not positive semi-definite: its sketch has the negative Ritz value "
                f"{smallest * scale:.3e} (the largest product norm is "
                f"{_largest_norm(image) * scale:.3e}); the "
                "approximation is of its positive part on the sketch. Sketch a Gauss-Newton "
                "matrix, or shift the operator, for one of the whole",
                IndefiniteSketchWarning,
            )
            return _positive_part(self._product, image, scale)
        # A negative Ritz value within rounding must not stop the Cholesky factorisation.
        shift = max(shift, -2 * smallest, torch.finfo(basis.dtype).tiny)
        return _stabilised(basis, image, core, shift, scale)


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


def _shift(image: Tensor, scale: float, shift_func: ShiftFunction | None) -> float:
    """ν in the scale of the image, AΩ divided by `scale`."""
    if shift_func is None:
        epsilon = torch.finfo(image.dtype).eps
        return float(len(image) ** 0.5 * epsilon * image.norm().item())
    value = checked_number(shift_func(image * scale), "the value of shift_func", minimum=0)
    return value / scale


def _largest_norm(columns: Tensor) -> float:
    return float(columns.norm(dim=0).max().item())


def _stabilised(
    basis: Tensor, image: Tensor, core: Tensor, shift: float, scale: float
) -> LowRankProductRepresentation:
    shifted = image + shift * basis
    identity = torch.eye(len(core), dtype=core.dtype, device=core.device)
    factor = torch.linalg.cholesky(core + shift * identity, upper=True)
    scaled = torch.linalg.solve_triangular(factor, shifted, upper=True, left=False)
    vectors, singular_values, _ = torch.linalg.svd(scaled, full_matrices=False)
    values = (singular_values.square() - shift).clamp(min=0)
    return LowRankProductRepresentation(values * scale, vectors)


def _positive_part(
    product: Callable[[Tensor], Tensor], image: Tensor, scale: float
) -> LowRankProductRepresentation:
    basis, _ = torch.linalg.qr(image)
    core = basis.T @ (product(basis) / scale)
    values, rotation = torch.linalg.eigh((core + core.T) / 2)
    return LowRankProductRepresentation(
        values.clamp(min=0).flip(0) * scale, (basis @ rotation).flip(1).contiguous(), clipped=True
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
        >>> operator_nystroem_approximation(A, rank=2).eigen_vals.round(decimals=2)
        tensor([4., 1.])
    """
    sketch = operator_sketch(operator, generator)
    sketch.grow(checked_count(rank, "rank"))
    return sketch.approximation(shift_func)


def operator_sketch(operator: Operator, generator: torch.Generator | None = None) -> NystroemSketch:
    """An empty sketch of a symmetric operator of float32 or float64."""
    linear = operator.linearize()
    return NystroemSketch(
        lambda columns: linear.apply(columns.T).T,
        operator.input_size,
        operator.dtype,
        operator.device,
        generator,
    )
