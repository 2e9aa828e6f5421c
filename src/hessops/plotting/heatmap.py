"""Scores of training points on test points as colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis

from hessops.errors import ArgumentError, ArgumentTypeError
from hessops.plotting.arguments import (
    Floats,
    Ints,
    Labels,
    Numbers,
    checked_labels,
    checked_numbers,
    label_order,
)
from hessops.plotting.canvas import axes_or_new, count_along, size_in_points, width_of
from hessops.plotting.style import MUTED, diverging, shortened
from hessops.validation import checked_count, checked_number

# A limit below the largest score needs a reason: outliers at least twice as large.
OUTLIER_FACTOR = 2.0
# Lines between more classes than these would hide what they separate.
MOST_LINES = 40
LONGEST_LABEL = 14
LABEL_SIZE = 8.5
# The position of a point is the middle of its cell.
HALF = 0.5
# Between the names of two classes, in points.
GAP = 3.0


def influence_heatmap(
    scores: Numbers,
    ax: Axes | None = None,
    *,
    test_labels: Labels | None = None,
    train_labels: Labels | None = None,
    quantile: float = 0.99,
    max_cells: tuple[int, int] = (200, 400),
) -> Axes:
    """Draws the influence of training points (columns) on test points (rows) as colours.

    White is zero, blue positive, orange negative, with equal limits on both sides. Where a few
    scores are more than twice as large as the given quantile of all magnitudes, the colours end at
    that quantile, and the ends of the colour bar are pointed.

    A matrix larger than `max_cells` is drawn by means of neighbouring scores, and says below how
    many scores a cell stands for: a mean hides single large scores, and those of both signs cancel.
    Cells never mix two classes.

    Args:
        scores: ``(m, n)``, of n training points on m test points.
        ax: Where to draw; ``None`` makes a figure. The colour bar takes a part of it.
        test_labels: Class of each test point ``(m,)``, by which the rows are sorted, in their
            order within a class.
        train_labels: Class of each training point ``(n,)``, by which the columns are sorted.
        quantile: Of the magnitudes that are drawn, in (0, 1]; 1 takes the largest.
        max_cells: Most rows and columns of cells; as many more as there are classes, if need be.

    Returns:
        The axes.

    Raises:
        ArgumentTypeError, DtypeError: An argument of another type.
        ShapeError: `scores` is no matrix or has no entries; another number of labels.
        ArgumentError: `quantile` or `max_cells` is out of range.
        NonFiniteError: NaN or infinity among the scores.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("agg")
        >>> import torch
        >>> from hessops.plotting import influence_heatmap
        >>> ax = influence_heatmap(torch.tensor([[1.0, -2.0, 0.0]]), train_labels=["b", "a", "b"])
        >>> ax.collections[0].get_array().tolist()
        [[-2.0, 1.0, 0.0]]
    """
    matrix = checked_numbers(scores, "scores", ndim=2)
    upper = checked_number(quantile, "quantile", minimum=0, exclusive=True)
    if upper > 1:
        raise ArgumentError(f"quantile must be at most 1, got {upper:g}")
    most_rows, most_columns = _checked_cells(max_cells)
    rows = _Side.of(test_labels, len(matrix), most_rows, "test_labels")
    columns = _Side.of(train_labels, matrix.shape[1], most_columns, "train_labels")
    cells = _means(matrix[rows.order][:, columns.order], rows.edges, columns.edges)
    axes = axes_or_new(ax)
    _draw_cells(axes, cells, rows, columns, upper)
    _describe(axes, rows, columns)
    return axes


@dataclass(frozen=True)
class _Side:
    """Rows or columns: their order, the cells that they are drawn in, and their classes.

    Attributes:
        order: Positions of the points in the order in which they are drawn.
        edges: Where cells begin, and the end of the last, in points.
        classes: Label -> where it begins and ends; empty without labels.
    """

    order: Ints
    edges: Ints
    classes: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, labels: object, count: int, most: int, name: str) -> _Side:
        if labels is None:
            return cls(np.arange(count), _split(0, count, most), {})
        given = checked_labels(labels, count, name)
        ranks = {label: rank for rank, label in enumerate(label_order(given))}
        of_points = np.array([ranks[label] for label in given])
        ends = np.cumsum(np.bincount(of_points, minlength=len(ranks)))
        spans = list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))
        pieces = [_split(start, end, max(1, most * (end - start) // count)) for start, end in spans]
        return cls(
            np.argsort(of_points, kind="stable"),
            np.unique(np.concatenate(pieces)),
            {str(label): span for label, span in zip(ranks, spans, strict=True)},
        )

    @property
    def count(self) -> int:
        """Of points."""
        return len(self.order)

    @property
    def sizes(self) -> Ints:
        """Points in each cell."""
        return np.diff(self.edges)


def _split(start: int, end: int, most: int) -> Ints:
    """Edges of at most so many cells of about equal size."""
    return np.unique(np.linspace(start, end, min(most, end - start) + 1).round().astype(np.int64))


def _means(matrix: Floats, rows: Ints, columns: Ints) -> Floats:
    sums = np.add.reduceat(np.add.reduceat(matrix, rows[:-1], axis=0), columns[:-1], axis=1)
    return sums / np.diff(rows)[:, None] / np.diff(columns)


def _draw_cells(axes: Axes, cells: Floats, rows: _Side, columns: _Side, quantile: float) -> None:
    largest = float(np.abs(cells).max())
    limit = float(np.quantile(np.abs(cells), quantile))
    if limit == 0 or largest <= OUTLIER_FACTOR * limit:
        limit = largest
    ends = (bool((cells < -limit).any()), bool((cells > limit).any()))
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}.get(ends, "neither")
    shown = limit if limit > 0 else 1.0  # zeros alone are white, whatever the limit
    mesh = axes.pcolormesh(
        columns.edges - HALF,
        rows.edges - HALF,
        cells,
        cmap=diverging(),
        vmin=-shown,
        vmax=shown,
        rasterized=True,
    )
    axes.set_xlim(-HALF, columns.count - HALF)
    axes.set_ylim(rows.count - HALF, -HALF)
    bar = axes.figure.colorbar(mesh, ax=axes, extend=extend, fraction=0.06, pad=0.02)
    if limit == 0:
        bar.set_ticks([0.0])
    bar.outline.set_linewidth(0.5)
    beyond = float((np.abs(cells) > limit).mean())
    bar.set_label(f"influence ({100 * beyond:.2g} % of cells beyond)" if beyond else "influence")


def _checked_cells(max_cells: object) -> tuple[int, int]:
    if not isinstance(max_cells, Sequence) or isinstance(max_cells, str) or len(max_cells) != 2:
        raise ArgumentTypeError(f"max_cells must be two integers, got {max_cells!r}")
    return checked_count(max_cells[0], "max_cells[0]"), checked_count(max_cells[1], "max_cells[1]")


def _describe(axes: Axes, rows: _Side, columns: _Side) -> None:
    """What rows, columns and cells are."""
    width, height = size_in_points(axes)
    if columns.classes:
        names = _placed(columns, width, lambda name: width_of(name) * LABEL_SIZE)
        turned = len(names) < len(columns.classes)
        if turned:
            names = _placed(columns, width, lambda _: LABEL_SIZE)
        _name_classes(axes.xaxis, names, turned=turned)
        _separate(axes.axvline, columns)
    else:
        count_along(axes.xaxis)
    if rows.classes:
        names = _placed(rows, height, lambda _: LABEL_SIZE)
        _name_classes(axes.yaxis, names, turned=False)
        _separate(axes.axhline, rows)
    else:
        count_along(axes.yaxis)
    axes.set_ylabel("test point, by class" if rows.classes else "test point")
    axes.set_xlabel(
        ("training point, by class" if columns.classes else "training point")
        + _note_on_cells(rows.sizes, columns.sizes)
    )


def _placed(side: _Side, room: float, length_of: Callable[[str], float]) -> dict[float, str]:
    """Middle of a class -> its name, without those that would touch the one before."""
    names: dict[float, str] = {}
    taken = -np.inf
    for label, (start, end) in side.classes.items():
        name = shortened(label, LONGEST_LABEL)
        middle = (start + end) / 2
        half = (length_of(name) + GAP) / 2
        if middle / side.count * room - half >= taken:
            names[middle - HALF] = name
            taken = middle / side.count * room + half
    return names


def _name_classes(axis: Axis, names: dict[float, str], *, turned: bool) -> None:
    axis.set_ticks(list(names), list(names.values()))
    axis.set_tick_params(length=0, labelsize=LABEL_SIZE, labelrotation=90 if turned else 0)


def _separate(line: Callable[..., object], side: _Side) -> None:
    """Thin lines between classes."""
    if len(side.classes) <= MOST_LINES:
        for start, _ in list(side.classes.values())[1:]:
            line(start - HALF, color=MUTED, linewidth=0.5)


def _note_on_cells(rows: Ints, columns: Ints) -> str:
    if rows.max() == columns.max() == 1:
        return ""

    def sizes(of: Ints) -> str:
        return f"{of.min()}" if of.min() == of.max() else f"{of.min()}–{of.max()}"

    return f"\neach cell: mean of {sizes(rows)} × {sizes(columns)} scores"
