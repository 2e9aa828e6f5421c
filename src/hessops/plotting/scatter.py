"""Two vectors of scores against each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from scipy.stats import spearmanr

from hessops.errors import ShapeError
from hessops.plotting.arguments import Floats, Numbers, checked_numbers, checked_pair_of_names
from hessops.plotting.canvas import axes_or_new
from hessops.plotting.style import INK, MINUS, POSITIVE, RULE

FIGURE_SIZE = (4.4, 4.2)
# More dots than these are drawn small and as pixels, also where the file is a drawing.
MANY = 500
# About the part of the axes that the correlation takes.
TEXT_SIZE = (0.6, 0.1)


def score_comparison(
    first: Numbers,
    second: Numbers,
    ax: Axes | None = None,
    *,
    names: Sequence[str] = ("first score", "second score"),
    identity: bool = False,
) -> Axes:
    """Draws two scores of the same points against each other, with their rank correlation.

    The rank correlation is Spearman's ρ, with mean ranks for ties; of a score that is constant
    there is none.

    Args:
        first: Scores ``(n,)``, at least two; along x.
        second: Other scores of the same points, ``(n,)``; along y.
        ax: Where to draw; ``None`` makes a figure.
        names: What they are called on the axes.
        identity: Draws the line of equal scores, where both have the same unit.

    Returns:
        The axes.

    Raises:
        ArgumentTypeError, DtypeError: `first`, `second`, `names` or `ax` is something else.
        ShapeError: Not one dimension, fewer than two scores, or two different numbers of them.
        NonFiniteError: NaN or infinity.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("agg")
        >>> import torch
        >>> from hessops.plotting import score_comparison
        >>> scores = torch.arange(5.0)
        >>> ax = score_comparison(scores, scores.square(), names=("EKFAC", "CG"))
        >>> ax.texts[0].get_text()
        "Spearman's ρ = 1.00, n = 5"
    """
    x = checked_numbers(first, "first", ndim=1)
    y = checked_numbers(second, "second", ndim=1)
    if len(x) != len(y):
        raise ShapeError(f"first has {len(x)} scores and second has {len(y)}")
    if len(x) < 2:
        raise ShapeError("one score each cannot be compared; give at least two")
    x_name, y_name = checked_pair_of_names(names, "names")
    axes = axes_or_new(ax, FIGURE_SIZE)
    _draw_lines(axes, x, y, identity)
    many = len(x) > MANY
    axes.scatter(
        x,
        y,
        s=6 if many else 16,
        alpha=max(0.1, 10 / len(x) ** 0.5) if many else 0.7,
        color=POSITIVE,
        linewidths=0,
        rasterized=many,
    )
    _write(axes, _correlation(x, y), x, y)
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    return axes


def _draw_lines(axes: Axes, x: Floats, y: Floats, identity: bool) -> None:
    """Zero where it is among the scores, and where both are equal."""
    for draw, values in ((axes.axvline, x), (axes.axhline, y)):
        if values.min() <= 0 <= values.max():
            draw(0, color=RULE, linewidth=0.8, zorder=0)
    if identity:
        axes.axline((0, 0), slope=1, color=RULE, linewidth=1, linestyle=(0, (4, 2)), zorder=0)


def _write(axes: Axes, text: str, x: Floats, y: Floats) -> None:
    """In the corner with the fewest dots."""
    wide, high = (x - x.min()) / (np.ptp(x) or 1), (y - y.min()) / (np.ptp(y) or 1)
    corners = [(right, top) for top in (True, False) for right in (False, True)]

    def crowd(corner: tuple[bool, bool]) -> int:
        across = wide if corner[0] else 1 - wide
        up = high if corner[1] else 1 - high
        return int(((across > 1 - TEXT_SIZE[0]) & (up > 1 - TEXT_SIZE[1])).sum())

    right, top = min(corners, key=crowd)
    axes.text(
        0.98 if right else 0.02,
        0.98 if top else 0.02,
        text,
        transform=axes.transAxes,
        ha="right" if right else "left",
        va="top" if top else "bottom",
        color=INK,
        fontsize="small",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )


def _correlation(x: Floats, y: Floats) -> str:
    for values in (x, y):
        if values.min() == values.max():
            return f"no rank correlation: a score is constant, n = {len(x)}"
    rho = f"{float(spearmanr(x, y).statistic):.2f}".replace("-", MINUS)
    return f"Spearman's ρ = {rho}, n = {len(x)}"
