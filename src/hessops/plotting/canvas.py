"""Axes that are given or made, and what is written on them."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator

from hessops.errors import ArgumentTypeError
from hessops.plotting.style import MUTED

# In inches: letters of the usual size stay legible when the picture is shown 400 pixels wide.
FIGURE_SIZE = (5.6, 3.8)
POINTS_PER_INCH = 72
MEASURED_SIZE = 100


def axes_or_new(ax: object, size: tuple[float, float] = FIGURE_SIZE) -> Axes:
    """The axes given, as they are, or those of a new figure of pyplot.

    Raises:
        ArgumentTypeError: `ax` is something else.
    """
    if ax is None:
        (made,) = new_column(1, size)
        return made
    if not isinstance(ax, Axes):
        raise ArgumentTypeError(f"ax must be matplotlib Axes or None, got {type(ax).__name__}")
    return ax


def new_column(rows: int, size: tuple[float, float] = FIGURE_SIZE) -> list[Axes]:
    """Axes below each other in a new figure of pyplot, without the frame that bounds nothing."""
    # Here, so that a backend is chosen when there is something to show, and not before.
    from matplotlib import pyplot

    _figure, axes = pyplot.subplots(rows, 1, figsize=size, layout="constrained", squeeze=False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    return list(axes.flat)


def explain(axes: Axes, named: Mapping[str, Artist]) -> None:
    """A legend, behind which lines are faint where there is no other place for it."""
    axes.legend(
        named.values(),
        named.keys(),
        fontsize="small",
        framealpha=0.85,
        edgecolor="none",
        fancybox=False,
    )


def say(axes: Axes, text: str) -> None:
    """A sentence in the middle, where there is nothing to draw."""
    axes.set_xlim(0, 1)
    axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, color=MUTED, ha="center", va="center")


def count_along(axis: Axis) -> None:
    """Whole numbers only."""
    axis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))


def size_in_points(axes: Axes) -> tuple[float, float]:
    """Width and height of the axes as they are now."""
    box, scale = axes.bbox, POINTS_PER_INCH / axes.figure.dpi
    return box.width * scale, box.height * scale


def width_of(text: str, *, bold: bool = False) -> float:
    """The width of a text in units of its font size."""
    if not text.strip():
        return 0.0
    # At a size at which the hinting of the font does not matter.
    font = FontProperties(weight="bold" if bold else "normal", size=MEASURED_SIZE)
    width, _, _ = TextToPath().get_text_width_height_descent(text, font, False)
    return float(width) / MEASURED_SIZE
