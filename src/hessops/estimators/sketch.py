r"""Sketches of the range of an operator, and what leaving columns out of them changes.

With :math:`A\Omega = QR` for test vectors :math:`\omega_1, \dots, \omega_k`, the estimators of
Epperly, Tropp & Webber (2024) need for each i the projection :math:`P_i` on the range of
:math:`A\Omega` without its column i. It is :math:`Q (I - s_i s_i^\top) Q^\top` with :math:`s_i` the
normalised column i of :math:`R^{-\top}`: the direction that is orthogonal to all other columns of
R. So the k projections cost no more than the one on the whole range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hessops.operators.base import TensorOperator
from hessops.operators.probing import Advance

# More of a correlation between samples than this, in units of their own variance, is noise of its
# estimate: over spectra from flat to 0.7^j it was at most 1.8.
MOST_CORRELATION = 2.0


@dataclass(frozen=True, eq=False)
class Sketch:
    r"""A basis of the range of :math:`A\Omega`; all in float64.

    Attributes:
        probes: Ω, ``(n, k)``.
        images: AΩ, ``(n, k)``.
        basis: Q, ``(n, r)``, orthonormal; r is the rank of AΩ to working precision.
        basis_images: AQ, or AᵀQ where that was asked for, ``(n, r)``.
        removed: S with columns :math:`s_i`, ``(r, k)``; zero where r < k, as then each column is in
            the range of the others.
    """

    probes: Tensor
    images: Tensor
    basis: Tensor
    basis_images: Tensor
    removed: Tensor

    @property
    def num_columns(self) -> int:
        """k."""
        return self.probes.shape[1]

    @property
    def can_remove(self) -> bool:
        """Whether the range is smaller without a column."""
        return self.basis.shape[1] == self.num_columns


def sketched(
    operator: TensorOperator,
    probes: Tensor,
    *,
    transpose: TensorOperator | None = None,
    advance: Advance,
) -> Sketch:
    """A sketch by one application to the probes and one to the basis of their images.

    Args:
        operator: A.
        probes: Ω as rows ``(k, n)`` of the operator's dtype.
        transpose: What the basis is multiplied by, if not A itself.
        advance: Told how many products were computed.
    """
    images = operator.apply(probes).double().T
    advance(len(probes))
    basis, removed = orthonormal_range(images)
    basis, basis_images = with_products(transpose or operator, basis, advance)
    return Sketch(probes.double().T, images, basis, basis_images, removed)


def orthonormal_range(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Q and S of some columns."""
    basis, factor = torch.linalg.qr(columns)
    left, sizes, _ = torch.linalg.svd(factor)
    kept = sizes > len(columns) * torch.finfo(sizes.dtype).eps * sizes[0]
    rank = int(kept.sum())
    if rank < len(sizes):
        # Of random columns that do not span k dimensions, none adds to the span of the others.
        return basis @ left[:, :rank], columns.new_zeros(rank, len(sizes))
    identity = torch.eye(rank, dtype=columns.dtype, device=columns.device)
    removed = torch.linalg.solve_triangular(factor.T, identity, upper=False)
    return basis, removed / removed.norm(dim=0)


def with_products(
    operator: TensorOperator, basis: Tensor, advance: Advance
) -> tuple[Tensor, Tensor]:
    """An orthonormal basis and its products, ``(n, r)`` each.

    The basis as the operator's dtype represents it is not quite orthonormal; it is made so after
    the product, of which linearity then gives that with the new basis.
    """
    rounded = basis.to(operator.dtype)
    products = operator.apply(rounded.T).double().T
    advance(basis.shape[1])
    if rounded.dtype == torch.float64:
        return basis, products
    rounded = rounded.double()
    factor = torch.linalg.cholesky(rounded.T @ rounded)
    basis, products = (
        torch.linalg.solve_triangular(factor, some.T, upper=False).T for some in (rounded, products)
    )
    return basis, products


# --- two columns left out ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pairs:
    r"""Pairs of columns (i, j), and the direction :math:`p` that j adds to :math:`s_i`.

    .. math:: p_{ij} = (s_j - \gamma s_i) / \nu

    is the unit vector by which the range without i and j is smaller than that without i.

    Attributes:
        first: i, ``(m,)``.
        second: j, ``(m,)``.
        gamma: γ, ``(m,)``.
        nu: ν, ``(m,)``.
    """

    first: Tensor
    second: Tensor
    gamma: Tensor
    nu: Tensor

    def of(self, columns: Tensor) -> Tensor:
        """M p for every pair, from the columns ``(..., k)`` of M S."""
        return (columns[:, self.second] - self.gamma * columns[:, self.first]) / self.nu


def _pairs(sketch: Sketch, first: Tensor, second: Tensor) -> Pairs:
    one, other = sketch.removed[:, first], sketch.removed[:, second]
    gamma = (one * other).sum(dim=0)
    # Once more, as the two may be almost parallel.
    gamma = gamma + (one * (other - gamma * one)).sum(dim=0)
    nu = (other - gamma * one).norm(dim=0)
    return Pairs(first, second, gamma, nu.clamp(min=torch.finfo(nu.dtype).eps))


def pair_covariance(sketch: Sketch, gains: Callable[[Pairs], Tensor]) -> Tensor:
    r"""An unbiased estimate of the covariance of two samples of an exchangeable estimator.

    Sample i is unbiased whatever the other columns are, and so is the one with column j left out
    as well; :math:`a_{ij}` is their difference. What j does to sample i and what i does to sample
    j is all that the two share: every other product of their parts has the mean zero, given all
    columns but one of the two. So the covariance is the mean of :math:`a_{ij} a_{ji}`.

    Args:
        sketch: The columns.
        gains: :math:`a_{ij}` of pairs, ``(m,)``, or ``(n, m)`` for n quantities, of whose
            covariances the sum is taken.
    """
    count = sketch.num_columns
    total = sketch.probes.new_zeros(())
    if not sketch.can_remove:
        return total
    for first, second, share in _cyclic_pairs(count, sketch.probes.device):
        there, back = _pairs(sketch, first, second), _pairs(sketch, second, first)
        total += share * (gains(there) * gains(back)).sum()
    return total / (count * (count - 1) / 2)


def _cyclic_pairs(count: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Each pair of columns once, k of them at a time; half of them twice is a share of one half."""
    first = torch.arange(count, device=device)
    for offset in range(1, count // 2 + 1):
        yield first, (first + offset) % count, 0.5 if 2 * offset == count else 1.0


def exchangeable_error(samples: Tensor, covariance: Tensor) -> Tensor:
    r"""The standard error of the mean of exchangeable samples.

    The variance of the mean is :math:`\sigma^2/k + (1 - 1/k)\,c`, with c the covariance of two
    samples, and their sample variance has the mean :math:`\sigma^2 - c`: together that is
    :math:`s^2/k + c`. Without c it would be too small, by a quarter on typical spectra.

    Args:
        samples: ``(k,)``, or ``(n, k)`` of n quantities.
        covariance: c, or the sum of n of them. They are noisy one by one: one ratio of c to
            :math:`s^2/k` serves all quantities.
    """
    variance = samples.var(dim=-1) / samples.shape[-1]
    total = variance.sum()
    ratio = torch.where(total > 0, covariance / total, 0.0).clamp(0.0, MOST_CORRELATION)
    return (variance * (1 + ratio)).sqrt()
