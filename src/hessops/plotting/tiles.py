"""The images that a prediction comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from hessops.errors import ArgumentError
from hessops.plotting.arguments import Floats, Labels, Numbers, checked_labels, checked_numbers
from hessops.plotting.canvas import POINTS_PER_INCH, axes_or_new, size_in_points, width_of
from hessops.plotting.images import chosen_images, scaled_alike, single_image
from hessops.plotting.ranking import Kind, ranked
from hessops.plotting.style import INK, MUTED, RULE, shortened, signed
from hessops.validation import checked_count

# In widths of an image.
GAP = 0.16
# From one line of letters to the next, in sizes of a letter.
LINE = 1.35
LETTERS = 10.0
TILE = 0.85 * POINTS_PER_INCH
# Rows are as wide as so many images, for what is written above them.
FEWEST_COLUMNS = 3
LONGEST_LABEL = 12


def top_examples(
    images: Numbers,
    scores: Numbers,
    ax: Axes | None = None,
    *,
    test_image: Numbers | None = None,
    labels: Labels | None = None,
    test_label: object = None,
    k: int = 5,
    cmap: str = "gray",
) -> Axes:
    """Draws the training images that help a test point most, and those that harm it most.

    Above each image stands its label, below it its score: positive for the helpful ones in the
    first row, negative for the harmful ones in the second, the most extreme on the left. Where
    fewer than k scores have a sign, there are fewer images.

    Args:
        images: Training images ``(n, H, W)``, ``(n, C, H, W)`` or ``(n, H, W, C)`` with C of 1
            or 3, tried in this order: integers from 0 to 255, or floats. Floats beyond [0, 1] are
            scaled, all images that are shown alike, by the smallest and largest value in them.
        scores: Influence of each on one test point, ``(n,)``.
        ax: Where to draw; ``None`` makes a figure. The axes lose their frame.
        test_image: The test image, of the shape of one of `images`; drawn on the left.
        labels: Of the training images, ``(n,)``. One that differs from `test_label` is bold.
        test_label: Of the test image.
        k: Most images of each kind.
        cmap: Colours of images with one channel; ``"gray"`` shows the smallest value as black.

    Returns:
        The axes.

    Raises:
        ArgumentTypeError, DtypeError: An argument of another type.
        ShapeError: Images, scores or labels of another shape, or of different numbers.
        ArgumentError: `k` below 1, integers beyond 0 to 255, or an unknown `cmap`.
        NonFiniteError: NaN or infinity among the scores, or in an image that is shown.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("agg")
        >>> import torch
        >>> from hessops.plotting import top_examples
        >>> ax = top_examples(torch.rand(3, 8, 8), torch.tensor([0.5, -2.0, 0.0]), labels=[3, 5, 3])
        >>> [text.get_text() for text in ax.texts]
        ['most helpful', '3', '+0.50', 'most harmful', '5', '−2.00']
    """
    checked_count(k, "k")
    if cmap not in colormaps:
        raise ArgumentError(f"cmap must be the name of a colour map of matplotlib, got {cmap!r}")
    numbers = checked_numbers(scores, "scores", ndim=1)
    kinds = ranked(numbers, k)
    named = None if labels is None else checked_labels(labels, len(numbers), "labels")
    stacks = [chosen_images(images, kind.points, len(numbers)) for kind in kinds]
    if test_image is not None:
        stacks.append(single_image(test_image, images))
    stacks = scaled_alike(stacks)
    captions = _captions(kinds, numbers)
    rows = [
        [
            _Tile(picture, _label(point, named), caption, _differs(point, named, test_label))
            for picture, caption, point in zip(stack, texts, kind.points.tolist(), strict=True)
        ]
        for kind, stack, texts in zip(kinds, stacks, captions, strict=False)
    ]
    test = None
    if test_image is not None:
        test = _Tile(stacks[-1][0], "" if test_label is None else _short(test_label), "", False)
    height, width = stacks[0].shape[1:3]
    layout = _Layout.of(rows, test, height / width, None if ax is None else axes_or_new(ax))
    axes = axes_or_new(ax, layout.inches)
    _draw_sheet(axes, layout, list(zip(kinds, rows, strict=True)), test, cmap)
    return axes


@dataclass(frozen=True)
class _Tile:
    """An image with what stands above and below it."""

    picture: Floats
    above: str
    below: str
    is_bold: bool


def _short(label: object) -> str:
    return shortened(str(label), LONGEST_LABEL)


def _label(point: int, labels: list[object] | None) -> str:
    return "" if labels is None else _short(labels[point])


def _differs(point: int, labels: list[object] | None, test_label: object) -> bool:
    return labels is not None and test_label is not None and str(labels[point]) != str(test_label)


def _captions(kinds: tuple[Kind, Kind], scores: Floats) -> list[list[str]]:
    """The scores of both kinds, with the same number of decimals."""
    sizes = len(kinds[0].points)
    every = signed(scores[np.concatenate([kind.points for kind in kinds])].tolist())
    return [every[:sizes], every[sizes:]]


@dataclass(frozen=True)
class _Layout:
    """Where things are, in points from the upper left.

    Attributes:
        tile: Width of an image.
        aspect: Height of an image by its width.
        letters: Size of the letters.
        columns: Images beside each other, without the test image.
        lines: Of letters above and below an image, with the heading.
        has_test: Whether there is a column for the test image.
    """

    tile: float
    aspect: float
    letters: float
    columns: int
    lines: int
    has_test: bool

    @staticmethod
    def of(rows: list[list[_Tile]], test: _Tile | None, aspect: float, ax: Axes | None) -> _Layout:
        """As large as the axes allow; of the usual size where there are none yet."""
        tiles = [tile for row in rows for tile in row] + ([test] if test else [])
        widest = max(
            (width_of(text, bold=True) for t in tiles for text in (t.above, t.below)), default=1
        )
        lines = 2 + any(tile.above for tile in tiles)
        columns = max(FEWEST_COLUMNS, *(len(row) for row in rows))

        def sized(tile: float) -> _Layout:
            letters = min(LETTERS, tile / 4, tile * (1 + GAP / 2) / max(widest, 1))
            return _Layout(tile, aspect, letters, columns, lines, test is not None)

        layout = sized(TILE)
        if ax is None:
            return layout
        width, height = size_in_points(ax)
        layout = sized(TILE * width / layout.width)
        while layout.height > height:
            layout = sized(layout.tile * 0.97)
        return layout

    @property
    def line(self) -> float:
        return LINE * self.letters

    @property
    def left(self) -> float:
        """Where the training images begin."""
        return self.tile * (1 + 4 * GAP) if self.has_test else 0.0

    @property
    def width(self) -> float:
        return self.left + self.tile * (self.columns * (1 + GAP) - GAP)

    @property
    def row_height(self) -> float:
        return self.tile * self.aspect + (self.lines + 0.3) * self.line

    @property
    def height(self) -> float:
        """Of two rows with a space between them."""
        return 2 * self.row_height + 0.6 * self.line

    @property
    def inches(self) -> tuple[float, float]:
        margin = 0.15
        return self.width / POINTS_PER_INCH + margin, self.height / POINTS_PER_INCH + margin


def _draw_sheet(
    axes: Axes,
    layout: _Layout,
    rows: list[tuple[Kind, list[_Tile]]],
    test: _Tile | None,
    cmap: str,
) -> None:
    axes.set_axis_off()
    if test is not None:
        top = (layout.height - layout.row_height) / 2
        _write(axes, layout, 0, top + layout.line, "test image", INK, bold=True)
        _draw_tile(axes, layout, test, (0, top), INK, cmap)
    for number, (kind, tiles) in enumerate(rows):
        top = number * (layout.row_height + 0.6 * layout.line)
        _write(axes, layout, layout.left, top + layout.line, kind.heading, kind.color, bold=True)
        for column, tile in enumerate(tiles):
            left = layout.left + column * layout.tile * (1 + GAP)
            _draw_tile(axes, layout, tile, (left, top), kind.color, cmap)
        if not tiles:
            _write(axes, layout, layout.left, top + 2.5 * layout.line, kind.none, MUTED)
    axes.set_xlim(0, layout.width)
    axes.set_ylim(layout.height, 0)
    axes.set_aspect("equal")


def _draw_tile(
    axes: Axes, layout: _Layout, tile: _Tile, corner: tuple[float, float], color: str, cmap: str
) -> None:
    left, top = corner
    bottom_of_text = top + (layout.lines - 1) * layout.line
    upper = bottom_of_text + 0.3 * layout.line
    lower = upper + layout.tile * layout.aspect
    axes.imshow(
        tile.picture,
        extent=(left, left + layout.tile, lower, upper),
        cmap=cmap,
        vmin=0,
        vmax=1,
        aspect="equal",
    )
    axes.add_patch(
        Rectangle(
            (left, upper), layout.tile, lower - upper, fill=False, edgecolor=RULE, linewidth=0.8
        )
    )
    if tile.above:
        _write(axes, layout, left, bottom_of_text, tile.above, INK, bold=tile.is_bold)
    if tile.below:
        _write(axes, layout, left, lower + layout.line, tile.below, color)


def _write(
    axes: Axes,
    layout: _Layout,
    left: float,
    baseline: float,
    text: str,
    color: str,
    *,
    bold: bool = False,
) -> None:
    axes.text(
        left,
        baseline,
        text,
        color=color,
        fontsize=layout.letters,
        fontweight="bold" if bold else "normal",
        va="baseline",
    )
