"""Estimates of the trace."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hessops.estimators.arguments import DEFAULT_PRODUCTS, Work, require_memory
from hessops.estimators.estimate import Estimate
from hessops.estimators.linear import LinearQuantity, Method
from hessops.estimators.sketch import (
    Pairs,
    Sketch,
    exchangeable_error,
    orthonormal_range,
    sketched,
    with_products,
)
from hessops.operators.base import TensorOperator
from hessops.operators.probing import exact_diagonal, rademacher_products
from hessops.randomness import rademacher, standard_normal

TraceMethod = Literal["hutchinson", "hutch++", "xtrace"]

# Vectors that are held at once for each product: the probes, their images, the basis and its
# images, and two more while projecting.
HELD_VECTORS = 4
SMALLER = "use fewer num_products, or method='hutchinson', which keeps none"


def trace(
    operator: TensorOperator,
    method: TraceMethod = "xtrace",
    *,
    num_products: int = DEFAULT_PRODUCTS,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""The trace of an operator, from products with random vectors.

    - ``"hutchinson"``: the mean of :math:`z^\top A z` over vectors z of random signs (Hutchinson
      1990), one product for each. Its error falls as :math:`1/\sqrt m` with m products.
    - ``"hutch++"``: :math:`\mathrm{tr}(Q^\top A Q)` exactly, for Q an orthonormal basis of A times
      m/3 Gaussian vectors, and the rest, :math:`(I - QQ^\top) A (I - QQ^\top)`, as by Hutchinson
      (Meyer, Musco, Musco & Woodruff 2021).
    - ``"xtrace"``: the mean over i of what that gives with Q from all m/2 Gaussian vectors but
      :math:`\omega_i`, and :math:`\omega_i` alone for the rest, normalised (Epperly, Tropp & Webber
      2024). The best of the three where the spectrum decays, as that of curvature
      does.

    All are unbiased for every square matrix, symmetric or not, and multiply by A alone. Of a sum,
    terms that know their trace (diagonal and explicit matrices, Kronecker factors, low rank, shifts
    and multiples of such ones) are not estimated. With as many products as rows, or more, the trace
    is computed exactly by n products with unit vectors, which is cheaper. The sums are in float64
    whatever the dtype of A.

    Hutchinson's method makes one pass over the data for as many vectors as fit 256 MiB, the others
    two in all.

    Args:
        operator: A.
        method: One of the three.
        num_products: Most products with A: at least 2 for ``"hutchinson"`` and 4 for the others.
        generator: Draws the vectors; without one, `torch.manual_seed` decides.
        progress: Shows a progress bar that counts products.

    Returns:
        The trace, with the standard deviation of the estimate as its standard error. That of
        ``"xtrace"`` takes the correlation of its samples into account.

    Raises:
        ArgumentTypeError, ArgumentError: An argument is something else.
        NonFiniteProductError: A product is NaN or infinite.
        MemoryLimitError: Not for ``"hutchinson"``: the vectors would not fit.

    Example:
        >>> import torch
        >>> from hessops import HessianOperator
        >>> from hessops.estimators import trace
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(300, 1, bias=False)
        >>> x = torch.randn(20, 300)  # the Hessian is XᵀX / 10, of rank 20
        >>> H = HessianOperator(model, torch.nn.MSELoss(), [(x, torch.zeros(20, 1))])
        >>> exact = x.square().sum().item() / 10
        >>> rough = trace(H, "hutchinson", num_products=20)
        >>> abs(rough.value - exact) < 3 * rough.standard_error
        True
        >>> abs(trace(H, num_products=60).value / exact - 1) < 1e-5
        True
        >>> shifted = trace(H.shift(0.5), num_products=60)
        >>> round(shifted.value - trace(H, num_products=60).value, 6)
        150.0
    """
    return TRACE.estimate(operator, method, num_products, generator, progress)


def _known(operator: TensorOperator) -> Tensor | None:
    value = operator._exact_trace()
    if value is None:
        return None
    return torch.tensor(value, dtype=torch.float64, device=operator.device)


def _hutchinson(
    operator: TensorOperator, count: int, source: torch.Generator, work: Work
) -> tuple[Tensor, Tensor]:
    pairs = rademacher_products(operator, count, source, work)
    samples = torch.cat([(signs * products).sum(dim=1) for signs, products in pairs])
    return samples.mean(), samples.std() / count**0.5


def _hutch_plus_plus(
    operator: TensorOperator, count: int, source: torch.Generator, work: Work
) -> tuple[Tensor, Tensor]:
    """One application to the probes of both parts, and one to the basis.

    A times the projected probes G - Q(QᵀG) is AG - (AQ)(QᵀG), which takes no product more.
    """
    require_memory(operator, HELD_VECTORS * count, SMALLER)
    rank, size, linear = count // 3, operator.input_size, operator.linearize()
    dtype, device = operator.dtype, operator.device
    normal = standard_normal((rank, size), source, dtype=dtype, device=device)
    signs = rademacher((count - 2 * rank, size), source, dtype=dtype, device=device)
    images = linear.apply(torch.cat([normal, signs])).double()
    work(len(images))
    basis, basis_images = with_products(linear, orthonormal_range(images[:rank])[0], work)
    probes, images = signs.double(), images[rank:]
    coordinates = probes @ basis.T
    residuals, residual_images = probes - coordinates @ basis, images - coordinates @ basis_images
    samples = (residuals * residual_images).sum(dim=1)
    return (basis * basis_images).sum() + samples.mean(), samples.std() / len(samples) ** 0.5


def _xtrace(
    operator: TensorOperator, count: int, source: torch.Generator, work: Work
) -> tuple[Tensor, Tensor]:
    require_memory(operator, HELD_VECTORS * count, SMALLER)
    probes = standard_normal(
        (count // 2, operator.input_size), source, dtype=operator.dtype, device=operator.device
    )
    samples = _XTraceSamples(sketched(operator.linearize(), probes, advance=work))
    return samples.values.mean(), exchangeable_error(samples.values, samples.covariance())


class _XTraceSamples:
    r"""What each vector makes of the trace, with the others as the sketch.

    .. math:: t_i = \mathrm{tr}(P_i A) + \frac{n - r_i}{\lVert u_i\rVert^2}\, u_i^\top A u_i,
        \qquad u_i = (I - P_i)\, \omega_i

    with :math:`r_i` the rank of :math:`P_i`. As :math:`\omega_i` is Gaussian, the direction of
    :math:`u_i` is uniform in the complement of the range; its length means nothing.

    Attributes:
        values: The samples, ``(k,)``.
    """

    def __init__(self, sketch: Sketch) -> None:
        self._sketch = sketch
        self._coordinates = sketch.probes @ sketch.basis.T
        lengths = (self._coordinates * sketch.removed).sum(dim=1, keepdim=True)
        inside = self._coordinates - lengths * sketch.removed
        residuals = sketch.probes - inside @ sketch.basis
        images = sketch.images - inside @ sketch.basis_images
        self._forms = (residuals * images).sum(dim=1)
        self._squares = residuals.square().sum(dim=1)
        # The gradient of uᵀAu by what is added to u within the range.
        self._slopes = residuals @ sketch.basis_images.T + images @ sketch.basis.T
        whole = sketch.basis @ sketch.basis_images.T
        self._inner = sketch.removed @ whole @ sketch.removed.T
        self._traces = whole.trace() - self._inner.diagonal()
        self._free = sketch.basis.shape[1] - len(sketch.basis) + int(sketch.can_remove)
        self.values = self._traces + self._free * self._forms / self._squares

    def covariance(self) -> Tensor:
        r"""An estimate of the covariance of two samples.

        Without vector j as well the range of sample i lacks another direction p, and u gains what
        :math:`\omega_i` has of it.
        """
        pairs, removed = Pairs(self._sketch), self._sketch.removed
        inner = pairs.forms(self._inner)
        gained = pairs.along(self._coordinates @ removed.T)
        slopes = pairs.along(self._slopes @ removed.T)
        forms = self._forms.unsqueeze(1) + gained * slopes + gained.square() * inner
        squares = self._squares.unsqueeze(1) + gained.square()
        without = self._traces.unsqueeze(1) - inner + (self._free + 1) * forms / squares
        added = self.values.unsqueeze(1) - without
        return pairs.covariance(added * added.T)


TRACE = LinearQuantity(
    name="trace",
    known=_known,
    by_units=lambda operator, advance: exact_diagonal(operator, advance).sum(),
    methods={
        "hutchinson": Method(2, _hutchinson),
        "hutch++": Method(4, _hutch_plus_plus),
        "xtrace": Method(4, _xtrace),
    },
)
