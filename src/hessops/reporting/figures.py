"""Figures of a page, inlined, each in a light and a dark version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from hessops.operators.solution import Solution
from hessops.plotting import convergence
from hessops.reporting.images import data_uri
from hessops.reporting.markup import Html, element, joined, number
from hessops.reporting.outcomes import failed_rows
from hessops.reporting.summary import Floats, ScoreSummary, magnitude_edges

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Figures of so many inches scroll on a narrow screen, where they would be too small to read.
WIDE = 6
# More lines than this are a smear, and make the page heavy.
MOST_LINES = 40
# Scores of smaller magnitude than this part of the largest one are left out of the histogram.
DECADES = 8
FEWEST_BINS, MOST_BINS = 8, 64
# Of the cells of the heat map, this part is within the range of its colours.
WITHIN_COLOURS = 0.99

# Between a line and the page.
LEAST_CONTRAST = 4.5

BLUE, ORANGE, GREY = "#2f7fd0", "#d9622b", "#8c8c8c"


@dataclass(frozen=True)
class Scheme:
    """The colours of a figure, which are those of the page around it."""

    page: str
    text: str
    line: str


LIGHT = Scheme("#ffffff", "#1d2430", "#8a94a2")
DARK = Scheme("#14181e", "#e4e8ee", "#7a8592")

KIND = {"svg": "svg+xml", "png": "png"}
Draw = Callable[["Axes", Scheme], None]


def require_matplotlib() -> None:
    """Raises `ImportError` with what to install where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401  # whether it is there
    except ImportError as error:
        raise ImportError(
            "a report draws with matplotlib; install it with: pip install 'hessops[plot]'"
        ) from error


# --- figures ------------------------------------------------------------------------------


def figure(
    draw: Draw,
    alt: str,
    caption: object,
    *,
    size: tuple[float, float] = (5.0, 3.2),
    form: Literal["svg", "png"] = "svg",
) -> Html:
    """A figure in both colour schemes, of which the browser shows one.

    Args:
        draw: Draws on axes, given the colours of the scheme.
        alt: What is seen, for those who do not see it.
        caption: What stands below it.
        size: Width and height in inches.
        form: ``"svg"`` for lines, ``"png"`` for cells.
    """
    dark, light = (
        data_uri(_drawn(draw, scheme, size, form), KIND[form]) for scheme in (DARK, LIGHT)
    )
    pixels = [round(96 * side) for side in size]
    picture = element(
        "picture",
        element("source", srcset=dark, media="screen and (prefers-color-scheme: dark)"),
        element("img", src=light, alt=alt, width=pixels[0], height=pixels[1]),
    )
    below = element("figcaption", caption)
    if size[0] < WIDE:
        return element("figure", picture, below)
    scrolling = element("div", picture, class_="scroll", role="group", tabindex="0", aria_label=alt)
    return element("figure", scrolling, below, class_="wide")


def _drawn(
    draw: Draw,
    scheme: Scheme,
    size: tuple[float, float],
    form: str,
) -> bytes:
    from matplotlib import style
    from matplotlib.figure import Figure

    edges = ("axes.edgecolor", "xtick.color", "ytick.color", "legend.edgecolor")
    texts = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    changed = {
        **dict.fromkeys(edges, scheme.line),
        **dict.fromkeys(texts, scheme.text),
        "axes.facecolor": scheme.page,
        "figure.facecolor": scheme.page,
        "savefig.facecolor": scheme.page,
        "legend.facecolor": scheme.page,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10.5,
        "svg.hashsalt": "hessops",  # equal figures are equal bytes
    }
    # The settings of the session are none of the page's, and are as before afterwards.
    with style.context(["default", changed]):
        drawing = Figure(figsize=size, layout="constrained")
        draw(drawing.add_subplot(), scheme)
        buffer = BytesIO()
        metadata = {"Date": None} if form == "svg" else None
        drawing.savefig(buffer, format=form, dpi=200, metadata=metadata)
    return buffer.getvalue()


def convergence_figure(solution: Solution, of: str) -> Html:
    """The residuals of a solve with a history; of many, those that ended worst.

    Args:
        solution: The outcomes.
        of: Which they are, for the caption.
    """
    total, lines = len(solution.status), _worst(solution)
    most = int(solution.iterations.max())
    caption = joined(
        [
            f"Residuals of {of} by step, as the method saw them. A dot is the true residual of "
            "what was returned: filled where it met its tolerance (dotted line: the loosest), "
            "hollow where it did not.",
            f" Shown are the {len(lines)} of {total} that ended worst."
            if len(lines) < total
            else "",
        ]
    )
    alt = f"Relative residual norms of {len(lines)} right-hand sides over at most {most} steps."

    def draw(axes: Axes, scheme: Scheme) -> None:
        from matplotlib.ticker import MaxNLocator

        convergence(_selected(solution, lines), axes)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        legend = axes.get_legend()
        if legend is not None and len(lines) < 2:
            legend.remove()
        _lift(axes, scheme)

    return figure(draw, alt, caption)


def _lift(axes: Axes, scheme: Scheme) -> None:
    """Lines that were chosen for white paper, moved towards the text where the page hides them."""
    from matplotlib.colors import to_hex
    from matplotlib.lines import Line2D

    for line in axes.findobj(Line2D):
        assert isinstance(line, Line2D)
        hollow = line.get_markerfacecolor() == "none"
        line.set_color(legible(to_hex(line.get_color()), scheme))
        line.set_markeredgecolor(line.get_color())
        line.set_markerfacecolor("none" if hollow else line.get_color())


def legible(colour: str, scheme: Scheme) -> str:
    """A colour of enough contrast to the page (4.5 to 1, as WCAG 2.1 asks of text).

    Example:
        >>> from hessops.reporting.figures import DARK, LIGHT, legible
        >>> legible("#0b4f8a", LIGHT), legible("#0b4f8a", DARK)
        ('#0b4f8a', '#648eb3')
    """
    from matplotlib.colors import to_hex, to_rgb

    end, mixed = np.array(to_rgb(scheme.text)), np.array(to_rgb(colour))
    while _contrast(mixed, np.array(to_rgb(scheme.page))) < LEAST_CONTRAST:
        mixed = 0.9 * mixed + 0.1 * end
    return to_hex(mixed.tolist())


def _contrast(one: Floats, other: Floats) -> float:
    def luminance(colour: Floats) -> float:
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return float(linear @ np.array([0.2126, 0.7152, 0.0722]))

    darker, lighter = sorted([luminance(one), luminance(other)])
    return (lighter + 0.05) / (darker + 0.05)


def _worst(solution: Solution) -> list[int]:
    """Which right-hand sides are drawn, in their order."""
    failed = set(failed_rows(solution))
    relative = solution.relative_residual_norms.tolist()
    rows = sorted(range(len(relative)), key=lambda row: (row not in failed, -relative[row]))
    return sorted(rows[:MOST_LINES])


def _selected(solution: Solution, rows: list[int]) -> Solution:
    """The outcomes of some right-hand sides, as far as they are drawn."""
    history = solution.residual_history or ()
    return replace(
        solution,
        status=tuple(solution.status[row] for row in rows),
        iterations=solution.iterations[rows],
        residual_norms=solution.residual_norms[rows],
        rhs_norms=solution.rhs_norms[rows],
        tolerances=solution.tolerances[rows],
        residual_history=tuple(history[row].cpu() for row in rows),
    )


def histogram_figure(summary: ScoreSummary) -> Html:
    """How many scores there are of each magnitude, helpful and harmful."""
    edges, (helpful, harmful), left_out = _binned(summary)
    caption = joined(
        [
            "How many scores there are of each magnitude, on a logarithmic axis.",
            f" {left_out:,} scores below {number(10 ** edges[0])} are not drawn."
            if left_out
            else "",
        ]
    )
    alt = (
        f"Histogram of {summary.num_positive:,} helpful and {summary.num_negative:,} harmful "
        f"scores by magnitude, from {number(10 ** edges[0])} to {number(10 ** edges[-1])}."
    )

    def draw(axes: Axes, _: Scheme) -> None:
        values = 10**edges
        for counts, colour, label in ((helpful, BLUE, "helpful"), (harmful, ORANGE, "harmful")):
            axes.stairs(counts, values, color=colour, alpha=0.25, fill=True)
            axes.stairs(counts, values, color=colour, linewidth=1.6, label=label)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("magnitude of the score")
        axes.set_ylabel("scores")
        axes.legend(frameon=False)

    return figure(draw, alt, caption)


def _binned(summary: ScoreSummary) -> tuple[Floats, npt.NDArray[np.int64], int]:
    """The edges that are drawn, as decimal logarithms, the counts, and how many are left out."""
    counts = np.stack([summary.helpful_bins, summary.harmful_bins])
    edges = magnitude_edges()
    filled = np.flatnonzero(counts.sum(axis=0))
    last = int(filled[-1]) + 1
    first = max(int(filled[0]), last - int(DECADES / (edges[1] - edges[0])))
    few = int(np.sqrt(counts.sum()))  # of few scores, bins of some each
    width = -(-(last - first) // min(max(few, FEWEST_BINS), MOST_BINS))
    first = max(0, last - width * -(-(last - first) // width))
    drawn = counts[:, first:last].reshape(2, -1, width).sum(axis=2)
    return edges[first : last + 1 : width], drawn, int(counts[:, :first].sum())


def heat_map_figure(summary: ScoreSummary) -> Html:
    """The scores of largest magnitude, test points by training points."""
    cells, (m, n) = summary.cells, summary.shape
    magnitudes = np.abs(cells[np.isfinite(cells)])
    limit = float(np.quantile(magnitudes, WITHIN_COLOURS)) if magnitudes.size else 0.0
    limit = limit or float(magnitudes.max(initial=0.0)) or 1.0
    has_beyond = bool(magnitudes.size and magnitudes.max() > limit)
    of_several = (m, n) != cells.shape
    caption = joined(
        [
            "Blue is helpful, orange harmful; one scale serves all rows.",
            " Each cell covers several points and shows the score of largest magnitude among them."
            if of_several
            else "",
            f" Colours end at ±{number(limit)}, which {WITHIN_COLOURS:.0%} of the cells are within."
            if has_beyond
            else "",
            " Grey cells hold scores that are not finite." if summary.num_non_finite else "",
        ]
    )
    alt = f"Heat map of the scores of {n:,} training points on {m:,} test points."

    def draw(axes: Axes, scheme: Scheme) -> None:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.ticker import MaxNLocator

        scale = [ORANGE, scheme.page, BLUE]
        shades = LinearSegmentedColormap.from_list("influence", scale).with_extremes(bad=GREY)
        image = axes.imshow(
            cells,
            cmap=shades,
            vmin=-limit,
            vmax=limit,
            aspect="auto",
            interpolation="nearest",
            extent=(-0.5, n - 0.5, m - 0.5, -0.5),
        )
        axes.set_xlabel("training point")
        axes.set_ylabel("test point")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
        extend = "both" if has_beyond else "neither"
        bar = axes.figure.colorbar(image, ax=axes, extend=extend, label="score")
        bar.outline.set_visible(False)

    height = min(3.6, 1.3 + 0.14 * len(cells))
    return figure(draw, alt, caption, size=(8.0, height), form="png")
