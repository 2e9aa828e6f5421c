"""Single eigenvalues with their signs and errors."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from hessops.errors import ArgumentError, ShapeError
from hessops.plotting.arguments import Floats, Numbers, checked_numbers
from hessops.plotting.canvas import axes_or_new, count_along, explain
from hessops.plotting.style import INK, MUTED, NEGATIVE, POSITIVE, RULE

# Beyond so many, marks would cover each other.
MANY = 60


@runtime_checkable
class Pairs(Protocol):
    """What `eigenvalues` draws: `hessops.estimators.Eigenpairs`, or the like of it."""

    @property
    def values(self) -> Tensor:
        """``(k,)``."""

    @property
    def residual_norms(self) -> Tensor:
        """‖A q − λ q‖ of each, ``(k,)``."""


def eigenvalues(values: Numbers | Pairs, ax: Axes | None = None, *, log: bool = True) -> Axes:
    """Draws eigenvalues from the largest to the smallest.

    Positive ones are dots, negative ones triangles of another colour that point down, and zeros
    crosses. Of eigenpairs the residual norm is a bar to both sides: within it lies an eigenvalue
    of the matrix. A hollow mark is one whose bar reaches zero, so that its sign is not certain.

    Args:
        values: Eigenvalues ``(k,)`` in any order, or eigenpairs with their residual norms.
        ax: Where to draw; ``None`` makes a figure.
        log: Draws magnitudes on a logarithmic axis, of both signs; zeros stand at its lower edge.
            Where all values are zero the axis is linear.

    Returns:
        The axes.

    Raises:
        ArgumentTypeError, DtypeError: `values` or `ax` is something else.
        ShapeError: Not one dimension, none at all, or another number of residual norms.
        ArgumentError: A negative residual norm.
        NonFiniteError: NaN or infinity.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("agg")
        >>> import torch
        >>> from hessops.plotting import eigenvalues
        >>> ax = eigenvalues(torch.tensor([-0.1, 10.0, 1.0]))
        >>> ax.get_ylabel(), [text.get_text() for text in ax.get_legend().get_texts()]
        ('|eigenvalue|', ['positive', 'negative'])
    """
    numbers, errors = _sorted(values)
    on_log = log and bool(numbers.any())
    axes = axes_or_new(ax)
    if on_log:
        axes.set_yscale("log", nonpositive="mask")
    else:
        axes.axhline(0, color=RULE, linewidth=0.8, zorder=0)
    places = np.arange(1.0, len(numbers) + 1)
    heights = np.abs(numbers) if on_log else numbers
    if errors is not None:
        _draw_errors(axes, places, heights, errors, on_log)
    _draw_marks(axes, places, numbers, errors, on_log)
    axes.set_xlabel("eigenvalue, from the largest")
    name = "|eigenvalue|" if on_log else "eigenvalue"
    axes.set_ylabel(name if errors is None else f"{name} ± residual norm")
    count_along(axes.xaxis)
    _explain_signs(axes)
    return axes


def _sorted(values: object) -> tuple[Floats, Floats | None]:
    """Eigenvalues in descending order, with their residual norms where there are some."""
    if isinstance(values, Tensor) or not isinstance(values, Pairs):
        numbers = checked_numbers(values, "values", ndim=1)
        return np.sort(numbers)[::-1], None
    numbers = checked_numbers(values.values, "values.values", ndim=1)
    errors = checked_numbers(values.residual_norms, "values.residual_norms", ndim=1)
    if errors.shape != numbers.shape:
        raise ShapeError(f"values has {len(numbers)} eigenvalues and {len(errors)} residual norms")
    if bool((errors < 0).any()):
        raise ArgumentError("values.residual_norms holds a negative number")
    order = np.argsort(-numbers, kind="stable")
    return numbers[order], errors[order]


def _draw_errors(axes: Axes, places: Floats, heights: Floats, errors: Floats, on_log: bool) -> None:
    low, high = heights - errors, heights + errors
    if on_log:
        # A bar that reaches zero goes down as far as anything that is drawn.
        seen = np.concatenate([heights[heights > 0], high[high > 0], low[low > 0]])
        lowest = float(seen.min()) / 2
        if bool((low <= 0).any()):
            axes.set_ylim(bottom=lowest)
        low = np.where(low > 0, low, lowest)
    shown = errors > 0
    axes.vlines(places[shown], low[shown], high[shown], color=MUTED, linewidth=1)


def _draw_marks(
    axes: Axes, places: Floats, numbers: Floats, errors: Floats | None, on_log: bool
) -> None:
    uncertain = np.zeros(len(numbers), bool) if errors is None else errors >= np.abs(numbers)
    signs = (
        ("positive", numbers > 0, "o", POSITIVE),
        ("negative", numbers < 0, "v", NEGATIVE),
        ("zero", numbers == 0, "x", INK),
    )
    for label, chosen, marker, color in signs:
        at_edge = on_log and label == "zero"
        heights = np.abs(numbers) if on_log else numbers
        for some, face in ((chosen & ~uncertain, color), (chosen & uncertain, "white")):
            if not some.any():
                continue  # an empty line that is not clipped would take room in a layout
            axes.plot(
                places[some],
                heights[some],
                transform=axes.get_xaxis_transform() if at_edge else axes.transData,
                clip_on=not at_edge,
                marker=marker,
                markersize=5.0 if len(numbers) <= MANY else 2.5,
                color=color,
                markerfacecolor=face,
                linestyle="none",
                label=_named(label, on_log, face == color),
            )


def _named(sign: str, on_log: bool, is_certain: bool) -> str:
    """What the legend says of marks; a linear axis shows the sign itself."""
    if not is_certain:
        return "sign uncertain"
    return sign if on_log else "_"


def _explain_signs(axes: Axes) -> None:
    """A legend, unless there is nothing but values that are positive or on an axis with signs."""
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    if set(named) - {"positive"}:
        explain(axes, named)
