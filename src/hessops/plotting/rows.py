"""The rows of a table that a prediction comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from hessops.errors import ArgumentTypeError, ShapeError
from hessops.plotting.arguments import Floats, Labels, Numbers, checked_labels, checked_numbers
from hessops.plotting.canvas import POINTS_PER_INCH, axes_or_new, size_in_points, width_of
from hessops.plotting.ranking import Kind, ranked
from hessops.plotting.style import INK, MUTED, RULE, aligned, shortened, signed
from hessops.validation import checked_count

LETTERS = 9.5
# From one line of letters to the next, in sizes of a letter.
LINE = 1.7
# Between two columns, and between two kinds of columns, in sizes of a letter.
GAP, WIDE_GAP = 1.3, 2.4
LONGEST_NAME = 24
LONGEST_LABEL = 10


def top_rows(
    features: Numbers,
    scores: Numbers,
    ax: Axes | None = None,
    *,
    names: Sequence[str] | None = None,
    test_row: Numbers | None = None,
    labels: Labels | None = None,
    test_label: object = None,
    k: int = 3,
    max_features: int = 20,
) -> Axes:
    """Writes a table of the training points that help a test point most, or harm it most.

    A column is a point: the test point first, then the helpful ones with their positive scores and
    the harmful ones with their negative scores, the most extreme on the left. A line is a feature,
    with numbers of four digits. Where fewer than k scores have a sign, there are fewer columns.

    Args:
        features: Training points ``(n, d)``.
        scores: Influence of each on one test point, ``(n,)``.
        ax: Where to write; ``None`` makes a figure. The axes lose their frame, and the letters
            shrink until all fits.
        names: Of the features, d of them; ``None`` counts them.
        test_row: Features of the test point, ``(d,)``.
        labels: Of the training points, ``(n,)``. One that differs from `test_label` is bold.
        test_label: Of the test point.
        k: Most points of each kind.
        max_features: Most features that are shown, the first ones; a last line counts the others.

    Returns:
        The axes.

    Raises:
        ArgumentTypeError, DtypeError: An argument of another type.
        ShapeError: Features, scores, names or labels of another shape or number.
        ArgumentError: `k` or `max_features` below 1.
        NonFiniteError: NaN or infinity.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("agg")
        >>> import torch
        >>> from hessops.plotting import top_rows
        >>> ax = top_rows(torch.eye(2), torch.tensor([0.5, -2.0]), names=["age", "height"])
        >>> [text.get_text() for text in ax.texts][:6]
        ['score', 'age', 'height', 'most helpful', '+0.50', '1']
    """
    checked_count(k, "k")
    checked_count(max_features, "max_features")
    matrix = checked_numbers(features, "features", ndim=2)
    numbers = checked_numbers(scores, "scores", ndim=1)
    if len(matrix) != len(numbers):
        raise ShapeError(f"features has {len(matrix)} rows, scores has {len(numbers)} entries")
    own = _checked_row(test_row, matrix.shape[1])
    given = None if labels is None else checked_labels(labels, len(numbers), "labels")
    kinds = ranked(numbers, k)
    shown = min(max_features, matrix.shape[1])
    left = _left_column(
        _checked_names(names, matrix.shape[1]), shown, has_labels=labels is not None
    )
    points = np.concatenate([kind.points for kind in kinds])
    groups = _groups(kinds, numbers, matrix[points, :shown], own, given, test_label)
    table = _Table([left, *groups])
    axes = axes_or_new(ax, table.inches)
    _draw(axes, table, LETTERS if ax is None else table.letters_within(size_in_points(axes)))
    return axes


@dataclass(frozen=True)
class _Cell:
    """A text of the table."""

    text: str
    color: str = INK
    is_bold: bool = False

    @property
    def width(self) -> float:
        """In sizes of a letter."""
        return width_of(self.text, bold=self.is_bold)


@dataclass(frozen=True)
class _Group:
    """Columns of one kind.

    Attributes:
        heading: What stands above all of them.
        columns: Cells from the top to the bottom, of each.
        is_text: Whether they are aligned on the left.
    """

    heading: _Cell
    columns: list[list[_Cell]]
    is_text: bool = False

    @property
    def width(self) -> float:
        """In sizes of a letter."""
        inside = sum(map(_width, self.columns)) + GAP * (len(self.columns) - 1)
        return max(inside, self.heading.width)


def _width(column: list[_Cell]) -> float:
    return max(cell.width for cell in column)


@dataclass(frozen=True)
class _Table:
    """Groups of columns beside each other, all with the same number of lines."""

    groups: list[_Group]

    @property
    def width(self) -> float:
        """In sizes of a letter."""
        return sum(group.width for group in self.groups) + WIDE_GAP * (len(self.groups) - 1)

    @property
    def height(self) -> float:
        """In sizes of a letter, with the line of headings."""
        return LINE * (1 + len(self.groups[0].columns[0]))

    @property
    def inches(self) -> tuple[float, float]:
        """Of a figure with letters of the usual size."""
        letter, margin = LETTERS / POINTS_PER_INCH, 0.15
        return self.width * letter + margin, self.height * letter + margin

    def letters_within(self, room: tuple[float, float]) -> float:
        """The size of letters, in points, with which it fits."""
        return min(LETTERS, room[0] / self.width, room[1] / self.height)


def _checked_row(row: object, count: int) -> Floats | None:
    if row is None:
        return None
    own = checked_numbers(row, "test_row", ndim=1)
    if len(own) != count:
        raise ShapeError(f"test_row has {len(own)} features, the training points have {count}")
    return own


def _checked_names(names: object, count: int) -> list[str]:
    if names is None:
        return [f"feature {position}" for position in range(count)]
    given = checked_labels(names, count, "names")
    if not all(isinstance(name, str) for name in given):
        raise ArgumentTypeError(f"names must be strings, got {given!r}")
    return [shortened(str(name), LONGEST_NAME) for name in given]


def _left_column(names: list[str], shown: int, *, has_labels: bool) -> _Group:
    """What the lines are."""
    cells = [_Cell("score", MUTED), *([_Cell("label", MUTED)] if has_labels else [])]
    cells += [_Cell(name) for name in names[:shown]]
    if shown < len(names):
        cells.append(_Cell(f"… and {len(names) - shown} more features", MUTED))
    return _Group(_Cell(""), [cells], is_text=True)


def _groups(
    kinds: tuple[Kind, Kind],
    scores: Floats,
    rows: Floats,
    own: Floats | None,
    labels: list[object] | None,
    test_label: object,
) -> list[_Group]:
    """The test point and the two kinds of training points; `rows` are theirs, one kind first."""
    every = rows if own is None else np.vstack([own[: rows.shape[1]], rows])
    texts = [list(point) for point in zip(*map(aligned, every.T.tolist()), strict=True)]
    points = [int(point) for kind in kinds for point in kind.points]
    captions = signed(scores[points].tolist())
    groups = []
    if own is not None:
        label = [] if labels is None else [_label(test_label, test_label)]
        values = [_Cell(text) for text in texts.pop(0)]
        groups.append(_Group(_Cell("test", is_bold=True), [[_Cell(""), *label, *values]]))
    for kind in kinds:
        columns = []
        for point in kind.points.tolist():
            label = [] if labels is None else [_label(labels[point], test_label)]
            values = [_Cell(text) for text in texts.pop(0)]
            columns.append([_Cell(captions.pop(0), kind.color), *label, *values])
        heading = _Cell(kind.heading, kind.color, is_bold=True)
        groups.append(_Group(heading, columns or [[_Cell(kind.none, MUTED)]], not columns))
    return groups


def _label(label: object, test_label: object) -> _Cell:
    differs = test_label is not None and str(label) != str(test_label)
    text = "" if label is None else shortened(str(label), LONGEST_LABEL)
    return _Cell(text, is_bold=differs)


def _draw(axes: Axes, table: _Table, letters: float) -> None:
    """In sizes of a letter from the upper left."""
    axes.set_axis_off()
    left = 0.0
    for group in table.groups:
        _draw_group(axes, group, left, letters)
        left += group.width + WIDE_GAP
    axes.set_xlim(0, table.width)
    axes.set_ylim(table.height, 0)
    axes.set_aspect("equal")


def _draw_group(axes: Axes, group: _Group, left: float, letters: float) -> None:
    if group.heading.text:
        _write(axes, group.heading, left, 0, letters)
    edge = left
    for column in group.columns:
        # Numbers end at the right of their column, so that their digits stand below each other.
        edge += _width(column)
        for line, cell in enumerate(column):
            start = edge - _width(column) if group.is_text else edge - cell.width
            _write(axes, cell, start, line + 1, letters)
        edge += GAP
    if not group.is_text:
        axes.hlines(LINE, left, left + group.width, color=RULE, linewidth=0.8)


def _write(axes: Axes, cell: _Cell, left: float, line: int, letters: float) -> None:
    axes.text(
        left,
        (line + 0.7) * LINE,
        cell.text,
        color=cell.color,
        fontsize=letters,
        fontweight="bold" if cell.is_bold else "normal",
        va="baseline",
    )
