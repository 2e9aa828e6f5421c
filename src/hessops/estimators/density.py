"""What is known of the spectrum of an operator from quadratures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt

import torch
from torch import Tensor

from hessops.errors import ArgumentError, ArgumentTypeError, NonFiniteError, ShapeError
from hessops.estimators.estimate import Estimate
from hessops.printed import Node, Printed, counted
from hessops.validation import checked_floating, checked_number

# Of a spectrum that is one point, the width of the density is this fraction of its size.
POINT_WIDTH = 0.01
# A range below this fraction of the largest Ritz value is one point.
POINT_RANGE = 1e-5


@dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity(Printed):
    r"""The distribution of the eigenvalues of a symmetric operator, as quadratures of probes.

    Each of m random probes q gives s Ritz values :math:`\theta_j` with weights :math:`w_j`, such
    that :math:`\sum_j w_j f(\theta_j) \approx q^\top f(A) q`, whose expectation is
    :math:`\mathrm{tr} f(A) / n`, the mean of f over the eigenvalues.

    Attributes:
        nodes: The Ritz values, ``(m, s)`` float64 on the CPU. Where a probe ended early, its
            largest fills the rest.
        weights: Their weights, ``(m, s)``, which sum to 1 in each row; zero where a probe ended
            early.
        size: n.
        num_products: Products with the operator that were computed.

    Example:
        >>> import torch
        >>> from hessops.estimators import SpectralDensity
        >>> nodes = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
        >>> weights = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
        >>> density = SpectralDensity(nodes, weights, size=4, num_products=4)
        >>> density
        SpectralDensity(2 probes of 2 steps, eigenvalues of 4 from 0 to 1, 4 products)
        >>> density.mean_of(torch.square)
        Estimate(0.625 ± 0.12, slq, 4 products)
    """

    nodes: Tensor
    weights: Tensor
    size: int
    num_products: int

    def _node(self) -> Node:
        probes, steps = self.nodes.shape
        smallest, largest = self.extremes
        return Node(
            f"SpectralDensity({counted(probes, 'probe')} of {counted(steps, 'step')}, eigenvalues "
            f"of {self.size} from {smallest:.4g} to {largest:.4g}, "
            f"{counted(self.num_products, 'product')})"
        )

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest Ritz value: within the spectrum, and close to its ends."""
        return self.nodes.min().item(), self.nodes.max().item()

    @property
    def default_width(self) -> float:
        r"""The width of `on`: the range of the Ritz values divided by the number of steps s.

        By it the quadrature of a probe is good to about :math:`e^{-8}` of the Gaussian's height;
        for a smaller one, more steps are needed, or peaks show that are Ritz values and not
        eigenvalues. Of a spectrum that is one point, 1 % of its size.
        """
        smallest, largest = self.extremes
        size = max(abs(smallest), abs(largest))
        if largest - smallest > POINT_RANGE * size:
            return (largest - smallest) / self.nodes.shape[1]
        return POINT_WIDTH * (size or 1.0)

    def on(self, grid: Tensor, width: float | None = None) -> tuple[Tensor, Tensor]:
        r"""The density smoothed by a Gaussian, and its standard error over the probes.

        .. math:: \phi_\sigma(t) = \frac1m \sum_{i,j} w_{ij}\,
                  \frac{1}{\sqrt{2\pi}\,\sigma} e^{-(t - \theta_{ij})^2 / 2\sigma^2}

        an estimate of :math:`\frac1n \sum_i N(t; \lambda_i, \sigma^2)`, whose integral is 1
        (Ghorbani, Krishnan & Xiao 2019).

        Args:
            grid: t, ``(g,)``.
            width: σ > 0; ``None`` is `default_width`.

        Returns:
            The density and its standard error, ``(g,)`` float64 on the CPU.

        Raises:
            ArgumentError: `width` is not positive.
            ArgumentTypeError, ShapeError, DtypeError, NonFiniteError: `grid` is something else.
        """
        points = _points(grid)
        sigma = (
            self.default_width
            if width is None
            else checked_number(width, "width", minimum=0, exclusive=True)
        )

        def smoothed(nodes: Tensor, weights: Tensor) -> Tensor:
            kernel = torch.exp(-0.5 * ((points.unsqueeze(1) - nodes) / sigma) ** 2)
            return kernel @ weights / (sqrt(2 * pi) * sigma)

        return self._over_probes(smoothed)

    def cumulative(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """The fraction of the eigenvalues at or below each point, and its standard error.

        The quadrature of a probe is a step function that crosses the one it stands for at every
        step: it is off by up to the weight of a Ritz value nearby.

        Args:
            grid: Points, ``(g,)``.

        Returns:
            The fraction and its standard error, ``(g,)`` float64 on the CPU.

        Raises:
            ArgumentTypeError, ShapeError, DtypeError, NonFiniteError: `grid` is something else.
        """
        points = _points(grid).unsqueeze(1)
        return self._over_probes(lambda nodes, weights: (nodes <= points).double() @ weights)

    def mean_of(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        r"""An estimate of :math:`\mathrm{tr} f(A) / n`, the mean of f over the eigenvalues.

        Its standard error is that of the probes. The quadratures are exact for polynomials of
        degree 2s - 1, and the better the smoother f is on the spectrum.

        Args:
            function: f, from a float64 tensor to one of its shape, entry by entry.

        Raises:
            ArgumentTypeError, ShapeError: `function` returns something else.
            NonFiniteError: It is NaN or infinite at a Ritz value.
        """
        values = function(self.nodes.clone())
        if not isinstance(values, Tensor):
            raise ArgumentTypeError(f"function must return a tensor, got {type(values).__name__}")
        if values.shape != self.nodes.shape:
            raise ShapeError(
                f"function maps shape {tuple(self.nodes.shape)} to {tuple(values.shape)}; it must "
                "act entry by entry"
            )
        if not values.isfinite().all():
            where = self.nodes[~values.isfinite()][0].item()
            raise NonFiniteError(f"function is NaN or infinite at the Ritz value {where:.3e}")
        value, error = mean_with_error((self.weights * values.double()).sum(dim=1))
        return Estimate(value.item(), error.item(), self.num_products, "slq")

    def _over_probes(self, function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The mean and its standard error of what each quadrature gives."""
        pairs = zip(self.nodes, self.weights, strict=True)
        return mean_with_error(torch.stack([function(nodes, weights) for nodes, weights in pairs]))


def mean_with_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the first dimension, and the estimate of its standard deviation.

    Raises:
        ArgumentError: There is one value, which says nothing of its deviation.
    """
    if len(values) < 2:
        raise ArgumentError("one probe has no standard error; take at least two")
    return values.mean(dim=0), values.std(dim=0) / len(values) ** 0.5


def _points(grid: Tensor) -> Tensor:
    return checked_floating(grid, "grid", ndim=1).detach().to("cpu", torch.float64)
