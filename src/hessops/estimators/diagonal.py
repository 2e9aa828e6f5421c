"""Estimates of the diagonal."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hessops.estimators.arguments import DEFAULT_PRODUCTS, Work, require_memory, transpose_of
from hessops.estimators.estimate import Estimate
from hessops.estimators.linear import LinearQuantity, Method
from hessops.estimators.sketch import (
    Pairs,
    Sketch,
    exchangeable_error,
    sketched,
)
from hessops.operators.base import TensorOperator
from hessops.operators.probing import exact_diagonal, probed_diagonal
from hessops.randomness import rademacher

DiagonalMethod = Literal["hutchinson", "xdiag"]

# Vectors that are held at once for each product: the probes, their images, the basis and its
# images, those of the directions removed, the samples, and what is made on the way.
HELD_VECTORS = 5
# Entries of all vectors that are multiplied at once, to stay within the processor's cache.
BLOCK_ENTRIES = 2**16
SMALLER = "use fewer num_products, or method='hutchinson', which keeps none"


def diagonal(
    operator: TensorOperator,
    method: DiagonalMethod = "xdiag",
    *,
    num_products: int = DEFAULT_PRODUCTS,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""The diagonal of an operator, from products with random vectors.

    - ``"hutchinson"``: the mean of :math:`z \odot Az` over vectors z of random signs (Bekas,
      Kokiopoulou & Saad 2007), one product for each. The variance of entry i is the sum of the
      squares of the other entries of its row (of their symmetric part), divided by m.
    - ``"xdiag"``: the mean over i of :math:`\mathrm{diag}(P_i A) + (I - P_i) A \omega_i \oslash
      \omega_i`, with :math:`P_i` the projection on the range of A times all m/2 vectors of random
      signs but :math:`\omega_i`, and :math:`\oslash` the division of entries (Epperly, Tropp &
      Webber 2024). The better one where the spectrum decays, as that of curvature does. It takes
      products with :math:`A^\top`. Unlike theirs, the entries are between 3/4 and 5/4 in size, so
      that few vectors do not miss a dimension of the range.

    Both are unbiased for every square matrix. Of a sum, terms that know their diagonal are not
    estimated; see `trace` for those. With as many products as rows, or more, the diagonal is
    computed exactly by n products with unit vectors, which is cheaper. The sums are in float64
    whatever the dtype of A.

    Hutchinson's method makes one pass over the data for as many vectors as fit 256 MiB, the other
    two in all.

    Args:
        operator: A.
        method: One of the two.
        num_products: Most products with A and its transpose: at least 2 for ``"hutchinson"`` and 4
            for ``"xdiag"``.
        generator: Draws the vectors; without one, `torch.manual_seed` decides.
        progress: Shows a progress bar that counts products.

    Returns:
        The diagonal, ``(n,)`` float64 on the operator's device, with the standard deviation of each
        entry's estimate as its standard error. That of ``"xdiag"`` takes the correlation of its
        samples into account, by one factor for all entries.

    Raises:
        ArgumentTypeError, ArgumentError: An argument is something else.
        StructureError: ``"xdiag"`` of an operator that is not known to be symmetric and has no
            adjoint.
        NonFiniteProductError: A product is NaN or infinite.
        MemoryLimitError: Not for ``"hutchinson"``: the vectors would not fit.

    Example:
        >>> import torch
        >>> from hessops import HessianOperator
        >>> from hessops.estimators import diagonal
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(300, 1, bias=False)
        >>> x = torch.randn(20, 300)  # the Hessian is XᵀX / 10, of rank 20
        >>> H = HessianOperator(model, torch.nn.MSELoss(), [(x, torch.zeros(20, 1))])
        >>> exact = x.square().sum(dim=0) / 10
        >>> found = diagonal(H, num_products=60)
        >>> found
        Estimate(of shape (300,), xdiag, 60 products)
        >>> bool((found.value - exact).abs().max() < 1e-4)
        True
    """
    return DIAGONAL.estimate(operator, method, num_products, generator, progress)


def _xdiag(
    operator: TensorOperator, count: int, source: torch.Generator, work: Work
) -> tuple[Tensor, Tensor]:
    linear = operator.linearize()
    transpose = transpose_of(linear, "method='xdiag'", "method='hutchinson' needs none")
    require_memory(operator, HELD_VECTORS * count, SMALLER)
    probes = _signs_of_sizes((count // 2, operator.input_size), source, operator)
    samples = _XDiagSamples(sketched(linear, probes, transpose=transpose, advance=work))
    return samples.values.mean(dim=0), exchangeable_error(samples.values, samples.covariance())


def _signs_of_sizes(
    shape: tuple[int, int], source: torch.Generator, operator: TensorOperator
) -> Tensor:
    """Random signs times numbers that are uniform between 3/4 and 5/4.

    Signs alone are not in general position: of six vectors, two of five coordinates have the same
    signs up to a factor in one of three draws. Where A is zero but for these five, the sketch then
    lacks a dimension of the range, and nothing tells. The sizes make what is left to sample noisier
    by 4 %.
    """
    signs = rademacher(shape, source, dtype=operator.dtype, device=operator.device)
    drawn = torch.rand(shape, generator=source, dtype=operator.dtype, device=source.device)
    return signs * (0.75 + drawn.to(operator.device) / 2)


class _XDiagSamples:
    r"""What each vector makes of the diagonal, with the others as the sketch.

    .. math:: d_i = \mathrm{diag}(P_i A) + (I - P_i) A \omega_i \oslash \omega_i

    With :math:`A\omega_i = Q r_i` and :math:`\rho_i = s_i^\top r_i`, and :math:`q_i = Q s_i` and
    :math:`z_i = A^\top Q s_i` for the direction that the range lacks without vector i, that is

    .. math:: d_i = \mathrm{diag}(Q Q^\top A) - q_i \odot (z_i - \rho_i \oslash \omega_i).

    Attributes:
        values: The samples, ``(k, n)``.
    """

    def __init__(self, sketch: Sketch) -> None:
        self._sketch = sketch
        coordinates = sketch.images @ sketch.basis.T
        lengths = (coordinates * sketch.removed).sum(dim=1, keepdim=True)
        self._directions = sketch.removed @ sketch.basis
        self._images = sketch.removed @ sketch.basis_images
        self._differences = self._images - lengths / sketch.probes
        whole = (sketch.basis * sketch.basis_images).sum(dim=0)
        self.values = whole - self._directions * self._differences

    def covariance(self) -> Tensor:
        r"""An estimate of the covariance of two samples, summed over all entries.

        With :math:`y_i = z_i - \rho_i \oslash \omega_i`, what vector j adds to sample i is
        :math:`(q_j - \gamma q_i) \odot (z_j - \gamma y_i) / \nu^2`. Its product with what i adds to
        sample j is a polynomial in the entries of i and those of j, whose sums over all entries are
        products of matrices.
        """
        pairs, size = Pairs(self._sketch), self._directions.shape[1]
        length = max(1, BLOCK_ENTRIES // len(self._directions))
        total = torch.zeros_like(pairs.gamma)
        for start in range(0, size, length):
            block = slice(start, start + length)
            total += _products(
                self._directions[:, block],
                self._images[:, block],
                self._differences[:, block],
                pairs.gamma,
            )
        return pairs.covariance(total / pairs.nu**4)


def _products(q: Tensor, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
    r"""Sums of the products of what vectors add to each other's samples, up to :math:`\nu^4`.

    .. math:: \sum \bigl[(1 + \gamma^2)\, q_i q_j - \gamma (q_i^2 + q_j^2)\bigr]
        \bigl[z_i z_j - \gamma (z_i y_i + z_j y_j) + \gamma^2 y_i y_j\bigr]

    Args:
        q: Some entries of :math:`q_i` as rows ``(k, b)``.
        z: Those of :math:`z_i`.
        y: Those of :math:`y_i`.
        gamma: γ, ``(k, k)``.

    Returns:
        The sum over these entries at [i, j].
    """
    squares, mixed = gamma.square(), z * y
    qz, qy, qq = q * z, q * y, q * q
    one_each = qz @ qz.T - gamma * _both(q @ (q * mixed).T) + squares * (qy @ qy.T)
    alone = (qq * mixed).sum(dim=1).expand_as(gamma)
    of_one = (qq * z) @ z.T - gamma * (alone.T + qq @ mixed.T) + squares * ((qq * y) @ y.T)
    return (1 + squares) * one_each - gamma * _both(of_one)


def _both(matrix: Tensor) -> Tensor:
    return matrix + matrix.T


DIAGONAL = LinearQuantity(
    name="diagonal",
    known=lambda operator: operator._exact_diagonal(),
    by_units=exact_diagonal,
    methods={"hutchinson": Method(2, probed_diagonal), "xdiag": Method(4, _xdiag)},
)
