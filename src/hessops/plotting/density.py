"""The density of eigenvalues."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from hessops.errors import ArgumentTypeError
from hessops.plotting.arguments import Floats, Numbers, checked_numbers
from hessops.plotting.canvas import axes_or_new
from hessops.plotting.style import INK, NEGATIVE, POSITIVE
from hessops.validation import checked_number

NUM_POINTS = 1000
# Beyond the extreme eigenvalues, as a part of the range between them.
MARGIN = 0.05
RUG_HEIGHT = 0.045


@runtime_checkable
class Density(Protocol):
    """What `spectral_density` draws: a `hessops.estimators.SpectralDensity`, or the like of it."""

    nodes: Tensor
    weights: Tensor
    size: int

    @property
    def extremes(self) -> tuple[float, float]:
        """About the smallest and the largest eigenvalue."""

    def on(self, grid: Tensor, width: float | None = None) -> tuple[Tensor, Tensor]:
        """Density and standard error at some points."""


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
        density: What `hessops.estimators.spectral_density` returned.
        ax: Where to draw; ``None`` makes a figure.
        log: Whether the density has a logarithmic axis.
        width: Of the kernel that stands for one eigenvalue; ``None`` leaves it to `density`.
        exact: Eigenvalues that are known, ``(n,)``: a tick for each at the lower edge and, with a
            `width`, their density with the same Gaussian kernel.

    Returns:
        The axes.

    Raises:
        ArgumentTypeError: `density` or `ax` is something else.
        ArgumentError: `width` is not positive.
        ShapeError, NonFiniteError: `exact`, or the density itself, cannot be drawn.
    """
    if not isinstance(density, Density):
        raise ArgumentTypeError(f"density must be a SpectralDensity, got {type(density).__name__}")
    kernel = None if width is None else checked_number(width, "width", minimum=0, exclusive=True)
    known = None if exact is None else checked_numbers(exact, "exact", ndim=1)
    grid = _grid(density, known, kernel)
    values, errors = _on(density, grid, kernel)
    axes = axes_or_new(ax)
    floor = _floor(density) if log else 0.0
    _draw_band(axes, grid, values, errors, floor)
    if known is not None:
        _draw_exact(axes, grid, known, kernel)
        axes.legend(fontsize="small", frameon=False)
    if log:
        axes.set_yscale("log", nonpositive="mask")
    axes.set_ylim(bottom=floor)
    axes.set_xlabel("eigenvalue λ")
    axes.set_ylabel("density" if errors is None else "density ± standard error")
    return axes


def _grid(density: Density, known: Floats | None, width: float | None) -> Floats:
    """Evenly spaced points, and the nodes, so that no peak is lost between two of them."""
    ends = list(checked_numbers(list(density.extremes), "density.extremes", ndim=1))
    if known is not None:
        ends += [float(known.min()), float(known.max())]
    low, high = min(ends), max(ends)
    space = max(MARGIN * (high - low), 4 * (width or 0.0))
    if space == 0:  # a single eigenvalue
        space = max(abs(low), 1.0)
    nodes = checked_numbers(density.nodes.flatten(), "density.nodes", ndim=1)
    every = np.concatenate([np.linspace(low - space, high + space, NUM_POINTS), nodes])
    return np.unique(every)


def _on(density: Density, grid: Floats, width: float | None) -> tuple[Floats, Floats | None]:
    """The density, and its standard error where one is known: one probe has none."""
    points = torch.tensor(grid, dtype=density.nodes.dtype, device=density.nodes.device)
    values, errors = density.on(points, width)
    shown = checked_numbers(values, "the density", ndim=1)
    if not bool(errors.isfinite().all()):
        return shown, None
    return shown, checked_numbers(errors, "the standard error", ndim=1)


def _floor(density: Density) -> float:
    low, high = density.extremes
    spread = high - low
    return 1 / (density.size * (spread if spread > 0 else max(abs(low), 1.0)))


def _draw_band(
    axes: Axes, grid: Floats, values: Floats, errors: Floats | None, floor: float
) -> None:
    if errors is not None:
        lower = np.maximum(values - errors, floor)
        upper = np.maximum(values + errors, floor)
        axes.fill_between(grid, lower, upper, color=POSITIVE, alpha=0.25, linewidth=0)
    axes.plot(grid, values, color=POSITIVE, linewidth=1.4, label="estimate")


def _draw_exact(axes: Axes, grid: Floats, known: Floats, width: float | None) -> None:
    rug = axes.vlines(
        known,
        0,
        RUG_HEIGHT,
        transform=axes.get_xaxis_transform(),
        color=INK,
        linewidth=0.8,
        alpha=0.7,
    )
    if width is None:
        rug.set_label("exact eigenvalues")
        return
    distances = (grid[:, None] - known) / width
    smooth = np.exp(-(distances**2) / 2).mean(axis=1) / (width * np.sqrt(2 * np.pi))
    axes.plot(grid, smooth, color=NEGATIVE, linestyle=(0, (4, 2)), linewidth=1.2, label="exact")
