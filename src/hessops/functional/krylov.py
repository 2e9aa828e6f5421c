"""Krylov spaces of symmetric maps, with full reorthogonalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessops.errors import NonFiniteProductError
from hessops.randomness import standard_normal

# A next basis vector below this multiple of eps·‖A‖ is rounding.
EXHAUSTION_FACTOR = 100
# Steps are looked at one by one at first, and later at intervals of this part of their number.
LOOK_FRACTION = 8


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Approximate eigenpairs from the projection of a symmetric map on a subspace.

    Attributes:
        values: Ritz values, ascending, ``(m,)`` float64.
        vectors: Orthonormal Ritz vectors as columns, ``(n, m)`` float64, if they were asked for.
        residual_norms: Bounds of ‖Av − θv‖, ``(m,)``.
    """

    values: Tensor
    vectors: Tensor
    residual_norms: Tensor

    def largest(self, count: int | None = None) -> RitzPairs:
        """The pairs of largest |θ| that can be told from zero, in descending order of |θ|.

        Left out are pairs whose residual is as large as |θ|, and what is zero to working precision.
        """
        sizes = self.values.abs()
        noise = torch.finfo(sizes.dtype).eps * len(self.vectors) * sizes.max()
        order = sizes.argsort(descending=True, stable=True)[:count]
        kept = order[(sizes > self.residual_norms.clamp(min=noise))[order]]
        return RitzPairs(self.values[kept], self.vectors[:, kept], self.residual_norms[kept])


def ritz_pairs(
    product: Callable[[Tensor], Tensor],
    size: int,
    *,
    max_iter: int,
    tol: float,
    generator: torch.Generator,
    device: torch.device,
    is_enough: Callable[[Tensor, Tensor], bool] | None = None,
    with_vectors: bool = True,
) -> RitzPairs:
    r"""Ritz pairs of a symmetric map from at most `max_iter` products, in float64.

    The method of Lanczos (1950), each new vector orthogonalised against all earlier ones, twice
    (Giraud et al. 2005: twice is enough). The whole projection :math:`Q^\top A Q` is kept and not
    its tridiagonal part alone, so that the pairs are right however the basis was continued: where
    the Krylov space is exhausted, by a random vector orthogonal to it.

    Args:
        product: v ↦ Av for a vector ``(n,)`` float64.
        size: n.
        max_iter: Most products.
        tol: The space counts as exhausted where the norm of the next basis vector, before it is
            normalised, is at most this.
        generator: Draws the start and the continuations.
        device: Where the basis lives.
        is_enough: Told now and then the Ritz values and their residual norms; ``True`` stops before
            `max_iter`.
        with_vectors: ``False`` returns none, ``(n, 0)``, and needs half of the memory.

    Raises:
        NonFiniteProductError: A product is NaN or infinite.

    Example:
        >>> import torch
        >>> from hessops.functional.krylov import ritz_pairs
        >>> diagonal = torch.tensor([3.0, 3.0, -1.0], dtype=torch.float64)
        >>> pairs = ritz_pairs(
        ...     lambda v: diagonal * v,
        ...     3,
        ...     max_iter=10,
        ...     tol=1e-7,
        ...     generator=torch.Generator().manual_seed(0),
        ...     device=torch.device("cpu"),
        ... )
        >>> pairs.values.round(decimals=6)
        tensor([-1.,  3.,  3.], dtype=torch.float64)
    """
    steps = min(max_iter, size)
    basis = torch.zeros(steps, size, dtype=torch.float64, device=device)
    projection = torch.zeros(steps, steps, dtype=torch.float64, device=device)
    # Norm of the part of A q_j outside the basis, where it did not become the next vector.
    left_out = torch.zeros(steps, dtype=torch.float64, device=device)
    eps = torch.finfo(torch.float64).eps
    following = _new_direction(basis[:0], generator)
    scale = 0.0
    next_look = 1
    for j in range(steps):
        basis[j] = following
        image = product(basis[j])
        if not image.isfinite().all():
            raise NonFiniteProductError(
                "a product with the operator was NaN or infinite: check the scale of the arguments"
            )
        scale = max(scale, image.norm().item())
        outside, coefficients = _orthogonalized(image, basis[: j + 1])
        projection[: j + 1, j] = coefficients
        norm = outside.norm().item()
        exhausted = norm <= max(tol, EXHAUSTION_FACTOR * eps * scale)
        left_out[j] = norm
        if j + 1 == steps:
            break
        # Seldom enough that the small eigenproblems do not add up.
        if is_enough is not None and j + 1 == next_look:
            values, _, residuals = _eigenproblem(projection, left_out, j + 1)
            if is_enough(values, residuals):
                steps = j + 1
                break
            next_look += 1 + next_look // LOOK_FRACTION
        if exhausted:
            following = _new_direction(basis[: j + 1], generator)
        else:
            following, left_out[j] = outside / norm, 0.0
    values, rotation, residuals = _eigenproblem(projection, left_out, steps)
    vectors = basis[:steps].T @ rotation if with_vectors else basis[:0].T
    return RitzPairs(values, vectors, residuals)


def _eigenproblem(projection: Tensor, left_out: Tensor, count: int) -> tuple[Tensor, ...]:
    """Eigenvalues, eigenvectors and residual norms of the projection on the first vectors."""
    upper = projection[:count, :count].triu()
    values, rotation = torch.linalg.eigh(upper + upper.triu(1).T)
    return values, rotation, (left_out[:count].unsqueeze(1) * rotation.abs()).sum(dim=0)


def _orthogonalized(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What of a vector is outside the span of orthonormal rows, and its coefficients inside."""
    first = basis @ vector
    once = vector - first @ basis
    second = basis @ once
    return once - second @ basis, first + second


def _new_direction(basis: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to the rows of a basis that does not span the space."""
    drawn = standard_normal((basis.shape[1],), generator, dtype=torch.float64, device=basis.device)
    outside, _ = _orthogonalized(drawn, basis)
    # Near the full dimension little of a random vector is outside: normalise, and project again.
    outside, _ = _orthogonalized(outside / outside.norm(), basis)
    unit: Tensor = outside / outside.norm()
    return unit
