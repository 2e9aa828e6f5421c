"""The density of eigenvalues."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from hessops.errors import ArgumentTypeError
from hessops.plotting.arguments import Floats, Numbers, checked_numbers
from hessops.plotting.canvas import axes_or_new, explain
from hessops.plotting.style import INK, NEGATIVE, POSITIVE
from hessops.validation import checked_number

NUM_POINTS = 1000
# Beyond the extreme eigenvalues, as a part of the range between them.
MARGIN = 0.05
RUG_HEIGHT = 0.045
# The upper end of the axis, in units of the largest density.
LOG_HEADROOM, HEADROOM = 3.0, 1.05
# Where a Gaussian has fallen to 1e-8 of its height, in units of its width.
TAIL = 6.0
# Where a kernel is sampled, in units of its width.
OFFSETS = (-3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
# Eigenvalues whose kernels are in memory together.
AT_ONCE = 256


@runtime_checkable
class Density(Protocol):
    """What `spectral_density` draws: a `hessops.estimators.SpectralDensity`, or the like of it."""

    @property
    def nodes(self) -> Tensor:
        """Ritz values, ``(m, s)``."""

    @property
    def size(self) -> int:
        """n."""

    @property
    def extremes(self) -> tuple[float, float]:
        """About the smallest and the largest eigenvalue."""

    @property
    def default_width(self) -> float:
        """The standard deviation of the Gaussian that stands for an eigenvalue."""

    def on(self, grid: Tensor, width: float | None = None) -> tuple[Tensor, Tensor]:
        """Density and standard error at some points, ``(g,)`` float64 each."""


def spectral_density(
    density: Density,
    ax: Axes | None = None,
    *,
    log: bool = True,
    width: float | None = None,
    exact: Numbers | None = None,
) -> Axes:
    """Draws an estimated density of eigenvalues with a band of one standard error to both sides.

    On a logarithmic axis the lower edge is the density of one eigenvalue spread over the whole
    spectrum: a curve that is below is less than one eigenvalue, and cut off.

    Args:
        density: A `hessops.estimators.SpectralDensity`.
        ax: Where to draw; ``None`` makes a figure.
        log: Whether the density has a logarithmic axis.
        width: Standard deviation of the Gaussian that stands for one eigenvalue; ``None`` takes
            the default of `density`.
        exact: Eigenvalues that are known, ``(n,)``: their density with the same Gaussian, and a
            tick for each at the lower edge.

    Returns:
        The axes.

    Raises:
        ArgumentTypeError, DtypeError: `density`, `exact` or `ax` is something else.
        ArgumentError: `width` is not positive.
        ShapeError, NonFiniteError: `exact`, or the density itself, cannot be drawn.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from hessops import DiagonalOperator, estimators, plotting
        >>> matrix = DiagonalOperator(torch.linspace(0, 1, 50, dtype=torch.float64))
        >>> density = estimators.spectral_density(matrix, num_probes=4)
        >>> axes = plotting.spectral_density(density, Figure().subplots())
        >>> axes.get_xlabel()
        'eigenvalue λ'
    """
    if not isinstance(density, Density):
        raise ArgumentTypeError(f"density must be a SpectralDensity, got {type(density).__name__}")
    sigma = checked_number(
        density.default_width if width is None else width, "width", minimum=0, exclusive=True
    )
    known = None if exact is None else checked_numbers(exact, "exact", ndim=1)
    grid = _grid(density, known, sigma)
    found = density.on(torch.tensor(grid), sigma)
    values = checked_numbers(found[0], "the density", ndim=1)
    errors = checked_numbers(found[1], "the standard error of the density", ndim=1)
    axes = axes_or_new(ax)
    floor = _floor(density, sigma) if log else 0.0
    if log:
        axes.set_yscale("log", nonpositive="clip")
    _draw_estimate(axes, grid, values, errors, floor)
    if known is not None:
        _draw_exact(axes, grid, known, sigma)
        explain(axes, dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)))
    highest = float((values + errors).max())
    axes.set_ylim(floor, highest * (LOG_HEADROOM if log else HEADROOM))
    axes.set_xlabel("eigenvalue λ")
    axes.set_ylabel("density ± standard error")
    return axes


def _grid(density: Density, known: Floats | None, width: float) -> Floats:
    """Evenly spaced points, and more around each node, so that no peak is lost between two."""
    ends = list(density.extremes)
    if known is not None:
        ends += [float(known.min()), float(known.max())]
    low, high = min(ends), max(ends)
    space = max(MARGIN * (high - low), TAIL * width)
    nodes = checked_numbers(density.nodes.flatten(), "density.nodes", ndim=1)
    near = (nodes[:, None] + width * np.array(OFFSETS)).flatten()
    return np.unique(np.concatenate([np.linspace(low - space, high + space, NUM_POINTS), near]))


def _floor(density: Density, width: float) -> float:
    """The density of one eigenvalue spread over the whole spectrum."""
    low, high = density.extremes
    return 1 / (density.size * max(high - low, 4 * width))


def _draw_estimate(axes: Axes, grid: Floats, values: Floats, errors: Floats, floor: float) -> None:
    axes.fill_between(
        grid,
        np.maximum(values - errors, floor),
        np.maximum(values + errors, floor),
        color=POSITIVE,
        alpha=0.25,
        linewidth=0,
    )
    axes.plot(grid, values, color=POSITIVE, linewidth=1.4, label="estimate")


def _draw_exact(axes: Axes, grid: Floats, known: Floats, width: float) -> None:
    axes.vlines(
        known,
        0,
        RUG_HEIGHT,
        transform=axes.get_xaxis_transform(),
        color=INK,
        linewidth=0.8,
        alpha=0.7,
    )
    smooth = np.zeros_like(grid)
    for some in np.array_split(known, -(-len(known) // AT_ONCE)):
        smooth += np.exp(-0.5 * ((grid[:, None] - some) / width) ** 2).sum(axis=1)
    smooth /= len(known) * width * np.sqrt(2 * np.pi)
    axes.plot(grid, smooth, color=NEGATIVE, linestyle=(0, (4, 2)), linewidth=1.2, label="exact")
