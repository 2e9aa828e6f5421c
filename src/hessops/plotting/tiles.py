"""The images that a prediction comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

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
# Of images beside each other: more go to the next line.
MOST_COLUMNS = 5
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

    Above each image stands its label, below it its score: positive for the helpful ones, and below
    them negative for the harmful ones, the most extreme first, five in a line. Where fewer than k
    scores have a sign, there are fewer images.

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
    blocks = [_Block(kind, tiles) for kind, tiles in zip(kinds, rows, strict=True)]
    sheet = _Sheet(blocks, test, height / width)
    axes = axes_or_new(ax, sheet.inches)
    _draw_sheet(axes, sheet if ax is None else sheet.within(size_in_points(axes)), cmap)
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
class _Block:
    """The images of one kind, in as many lines as they need."""

    kind: Kind
    tiles: list[_Tile]

    @property
    def lines(self) -> list[list[_Tile]]:
        return [
            self.tiles[start : start + MOST_COLUMNS]
            for start in range(0, len(self.tiles), MOST_COLUMNS)
        ]


@dataclass(frozen=True)
class _Sheet:
    """What is drawn and where, in points from the upper left.

    Attributes:
        blocks: The images of each kind, below each other.
        test: The test image, on the left of them.
        aspect: Height of an image by its width.
        tile: Width of an image.
    """

    blocks: list[_Block]
    test: _Tile | None
    aspect: float
    tile: float = TILE

    def within(self, room: tuple[float, float]) -> _Sheet:
        """As large as some axes allow."""
        sheet = replace(self, tile=self.tile * room[0] / self.width)
        while sheet.height > room[1]:
            sheet = replace(sheet, tile=sheet.tile * 0.97)
        return sheet

    @property
    def tiles(self) -> list[_Tile]:
        tiles = [tile for block in self.blocks for tile in block.tiles]
        return [*tiles, self.test] if self.test else tiles

    @cached_property
    def letters(self) -> float:
        """Size of the letters, with which nothing touches what is beside it."""
        texts = [(text, t.is_bold) for t in self.tiles for text in (t.above, t.below)]
        widest = max((width_of(text, bold=bold) for text, bold in texts), default=0.0)
        return min(LETTERS, self.tile / 4, self.tile * (1 + GAP / 2) / max(widest, 1.0))

    @property
    def line(self) -> float:
        """From one line of letters to the next."""
        return LINE * self.letters

    @property
    def above(self) -> float:
        """From the top of an image's place to the image."""
        return self.line * (1.3 if any(tile.above for tile in self.tiles) else 0.3)

    @property
    def step(self) -> float:
        """From one line of images to the next."""
        return self.above + self.tile * self.aspect + 1.4 * self.line

    @property
    def left(self) -> float:
        """Where the training images begin."""
        return self.tile * (1 + 4 * GAP) if self.test else 0.0

    def height_of(self, block: _Block) -> float:
        """With its heading, or the sentence that there is no such image."""
        return self.line + max(1.5 * self.line, len(block.lines) * self.step)

    @property
    def space(self) -> float:
        """Between two kinds."""
        return 0.5 * self.line

    @property
    def width(self) -> float:
        longest = max(len(line) for block in self.blocks for line in [*block.lines, []])
        columns = max(FEWEST_COLUMNS, longest)
        return self.left + self.tile * (columns * (1 + GAP) - GAP)

    @property
    def height(self) -> float:
        blocks = sum(map(self.height_of, self.blocks)) + self.space
        return max(blocks, self.line + self.step if self.test else 0.0)

    @property
    def inches(self) -> tuple[float, float]:
        margin = 0.2
        return self.width / POINTS_PER_INCH + margin, self.height / POINTS_PER_INCH + margin


def _draw_sheet(axes: Axes, sheet: _Sheet, cmap: str) -> None:
    axes.set_axis_off()
    if sheet.test is not None:
        top = (sheet.height - sheet.line - sheet.step) / 2
        _write(axes, sheet, (0, top + sheet.line), "test image", INK, bold=True)
        _draw_tile(axes, sheet, sheet.test, (0, top + sheet.line), INK, cmap)
    top = 0.0
    for block in sheet.blocks:
        _draw_block(axes, sheet, block, top, cmap)
        top += sheet.height_of(block) + sheet.space
    # Room for the frames.
    axes.set_xlim(-1, sheet.width + 1)
    axes.set_ylim(sheet.height + 1, -1)
    axes.set_aspect("equal")


def _draw_block(axes: Axes, sheet: _Sheet, block: _Block, top: float, cmap: str) -> None:
    kind, below = block.kind, top + sheet.line
    _write(axes, sheet, (sheet.left, below), kind.heading, kind.color, bold=True)
    if not block.tiles:
        _write(axes, sheet, (sheet.left, below + 1.2 * sheet.line), kind.none, MUTED)
    for number, line in enumerate(block.lines):
        for column, tile in enumerate(line):
            left = sheet.left + column * sheet.tile * (1 + GAP)
            _draw_tile(axes, sheet, tile, (left, below + number * sheet.step), kind.color, cmap)


def _draw_tile(
    axes: Axes, sheet: _Sheet, tile: _Tile, corner: tuple[float, float], color: str, cmap: str
) -> None:
    left, upper = corner[0], corner[1] + sheet.above
    lower = upper + sheet.tile * sheet.aspect
    axes.imshow(
        tile.picture, extent=(left, left + sheet.tile, lower, upper), cmap=cmap, vmin=0, vmax=1
    )
    frame = Rectangle((left, upper), sheet.tile, lower - upper, fill=False, edgecolor=RULE)
    frame.set_linewidth(0.8)
    axes.add_patch(frame)
    if tile.above:
        where = (left, upper - 0.3 * sheet.line)
        _write(axes, sheet, where, tile.above, INK, bold=tile.is_bold)
    if tile.below:
        _write(axes, sheet, (left, lower + sheet.line), tile.below, color)


def _write(
    axes: Axes,
    sheet: _Sheet,
    place: tuple[float, float],
    text: str,
    color: str,
    *,
    bold: bool = False,
) -> None:
    axes.text(
        *place,
        text,
        color=color,
        fontsize=sheet.letters,
        fontweight="bold" if bold else "normal",
        va="baseline",
    )
