"""Estimates with their standard errors."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

from matplotlib.axes import Axes

from hessops.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from hessops.estimators import Estimate
from hessops.plotting.canvas import FIGURE_SIZE, axes_or_new
from hessops.plotting.style import INK, MUTED, POSITIVE, shortened
from hessops.validation import checked_number

ROW_HEIGHT = 0.42
LONGEST_LABEL = 24


def estimates(
    named: Mapping[str, Estimate], ax: Axes | None = None, *, exact: float | None = None
) -> Axes:
    r"""Draws estimates of one number below each other, with one and two standard errors.

    A dot is the value, the thick bar one standard error to both sides and the thin one two. A
    hollow dot has no finite standard error, as an estimate from one probe.

    Args:
        named: Label -> an estimate whose value is one number.
        ax: Where to draw; ``None`` makes a figure.
        exact: The number itself, where it is known: a line.

    Returns:
        The axes.

    Raises:
        ArgumentTypeError: `named` or `ax` is something else.
        ArgumentError: No estimate, or one with entries.
        NonFiniteError: A value is NaN or infinite.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("agg")
        >>> from hessops.estimators import Estimate
        >>> from hessops.plotting import estimates
        >>> found = {"Hutchinson": Estimate(9.1, 0.8, 32, "hutchinson")}
        >>> ax = estimates(found, exact=10.0)
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['Hutchinson\n32 products']
    """
    numbers = _checked(named)
    known = None if exact is None else checked_number(exact, "exact")
    axes = axes_or_new(ax, (FIGURE_SIZE[0], 1.0 + ROW_HEIGHT * max(2, len(numbers))))
    for row, (value, error) in enumerate(numbers):
        _draw_interval(axes, row, value, error)
    if known is not None:
        axes.axvline(known, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=0)
        _label(axes, known)
    labels = [
        f"{shortened(str(label), LONGEST_LABEL)}\n{one.num_products:,} product"
        + ("s" if one.num_products != 1 else "")
        for label, one in named.items()
    ]
    axes.set_yticks(range(len(labels)), labels, fontsize="small")
    axes.set_ylim(len(labels) - 0.4, -0.9 if known is not None else -0.6)
    axes.tick_params(axis="y", length=0)
    # On the left, out of the way of a power of ten.
    axes.set_xlabel("estimate ± 1 and 2 standard errors", loc="left")
    return axes


def _checked(named: object) -> list[tuple[float, float]]:
    if not isinstance(named, Mapping):
        raise ArgumentTypeError(
            f"named must be a mapping from labels to estimates, got {type(named).__name__}"
        )
    if not named:
        raise ArgumentError("named is an empty mapping: give at least one estimate")
    numbers = []
    for label, one in named.items():
        if not isinstance(one, Estimate):
            raise ArgumentTypeError(
                f"named[{label!r}] must be an Estimate, got {type(one).__name__}"
            )
        try:
            value, error = float(one.value), float(one.standard_error)
        except (RuntimeError, ValueError) as failure:
            raise ArgumentError(
                f"named[{label!r}] has entries; draw estimates of one number, such as a trace"
            ) from failure
        if not isfinite(value):
            raise NonFiniteError(f"named[{label!r}] has the value {value}")
        numbers.append((value, error))
    return numbers


def _label(axes: Axes, known: float) -> None:
    """The name of the line, on the side with more room."""
    low, high = axes.get_xlim()
    on_left = known > (low + high) / 2
    axes.annotate(
        "exact",
        (known, 1),
        xytext=(-3 if on_left else 3, -1),
        textcoords="offset points",
        xycoords=("data", "axes fraction"),
        ha="right" if on_left else "left",
        va="top",
        fontsize="small",
    )


def _draw_interval(axes: Axes, row: int, value: float, error: float) -> None:
    known = isfinite(error)
    if known and error > 0:
        for width, factor in ((1.2, 2), (4.0, 1)):
            ends = (value - factor * error, value + factor * error)
            axes.hlines(row, *ends, color=POSITIVE, linewidth=width)
    axes.plot(
        [value],
        [row],
        marker="o",
        markersize=7,
        color=POSITIVE if known else MUTED,
        markerfacecolor=POSITIVE if known else "white",
        markeredgecolor="white" if known else MUTED,
        linestyle="none",
        zorder=3,
    )
