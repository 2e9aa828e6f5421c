"""What is kept of scores that may be larger than memory, found in one pass over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hessops.influence.lazy import LazyInfluences
from hessops.reporting.chunks import Piece, SlicedArray, checked_shape, pieces

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# Cells of the heat map.
MOST_ROWS, MOST_COLUMNS = 120, 300
# Bins of magnitudes, from below the smallest float64 to above the largest.
BINS_PER_DECADE, LOWEST_DECADE, HIGHEST_DECADE = 24, -330, 310


@dataclass(frozen=True)
class Extremes:
    """Some training points by their influence on one test point, the most extreme first.

    Attributes:
        indices: Which training points.
        values: Their finite influences, all of one sign.
    """

    indices: Integers
    values: Floats


@dataclass(frozen=True)
class ScoreSummary:
    """What a report says of all scores.

    Attributes:
        shape: ``(m, n)``.
        num_finite: How many scores are neither NaN nor infinite; the numbers below are of those.
        num_positive: How many of them are above zero.
        num_negative: How many are below zero.
        mean: Their mean; NaN where there is none.
        deviation: Their standard deviation.
        smallest: The most negative.
        largest: The most positive.
        non_finite: NaN and infinite scores by test point, ``(m,)``.
        helpful_bins: Positive scores by magnitude; see `magnitude_edges`.
        harmful_bins: Negative ones.
        cells: Scores of largest magnitude in each cell of a heat map, ``(rows, columns)``; NaN
            where a score in the cell is not finite.
        helpful: Test point -> the training points of most positive influence.
        harmful: Test point -> the training points of most negative influence.
    """

    shape: tuple[int, int]
    num_finite: int
    num_positive: int
    num_negative: int
    mean: float
    deviation: float
    smallest: float
    largest: float
    non_finite: Integers
    helpful_bins: Integers
    harmful_bins: Integers
    cells: Floats
    helpful: dict[int, Extremes]
    harmful: dict[int, Extremes]

    @property
    def num_non_finite(self) -> int:
        """NaN and infinite scores."""
        return self.shape[0] * self.shape[1] - self.num_finite


def magnitude_edges() -> Floats:
    """The edges of the bins of magnitudes, as decimal logarithms."""
    bins = (HIGHEST_DECADE - LOWEST_DECADE) * BINS_PER_DECADE
    return LOWEST_DECADE + np.arange(bins + 1) / BINS_PER_DECADE


def summarised(
    scores: SlicedArray | LazyInfluences, test_points: Sequence[int], top: int
) -> ScoreSummary:
    """One pass over all scores.

    Args:
        scores: ``(m, n)``; see `pieces`.
        test_points: Those for which extreme training points are kept.
        top: How many of each sign.

    Raises:
        ArgumentTypeError, ShapeError, DtypeError: See `checked_shape` and `pieces`.

    Example:
        >>> import numpy as np
        >>> from hessops.reporting.summary import summarised
        >>> found = summarised(np.array([[1.0, -2.0, 3.0, np.nan]]), [0], 1)
        >>> found.num_finite, found.helpful[0].indices, found.harmful[0].values
        (3, array([2]), array([-2.]))
    """
    shape = checked_shape(scores)
    numbers, cells = _Numbers(shape[0]), _Cells(shape)
    helpful = {point: _Top(top, sign=1) for point in test_points}
    harmful = {point: _Top(top, sign=-1) for point in test_points}
    for piece in pieces(scores):
        numbers.add(piece)
        cells.add(piece)
        for point in test_points:
            if piece.rows.start <= point < piece.rows.stop:
                row = piece.values[point - piece.rows.start]
                helpful[point].add(row, piece.columns.start)
                harmful[point].add(row, piece.columns.start)
    return ScoreSummary(
        shape,
        numbers.num_finite,
        int(numbers.bins[0].sum()),
        int(numbers.bins[1].sum()),
        numbers.mean if numbers.num_finite else np.nan,
        numbers.deviation,
        numbers.smallest,
        numbers.largest,
        numbers.non_finite,
        numbers.bins[0],
        numbers.bins[1],
        cells.strongest(),
        {point: found.extremes() for point, found in helpful.items()},
        {point: found.extremes() for point, found in harmful.items()},
    )


class _Numbers:
    """Counts, moments, range and magnitudes."""

    def __init__(self, m: int) -> None:
        self.num_finite = 0
        self.mean = 0.0
        self.squares = 0.0
        self.smallest, self.largest = np.inf, -np.inf
        self.non_finite: Integers = np.zeros(m, np.int64)
        bins = (HIGHEST_DECADE - LOWEST_DECADE) * BINS_PER_DECADE
        self.bins: Integers = np.zeros((2, bins), np.int64)

    def add(self, piece: Piece) -> None:
        is_finite = np.isfinite(piece.values)
        self.non_finite[piece.rows] += (~is_finite).sum(axis=1)
        values = piece.values[is_finite]
        if not values.size:
            return
        self.smallest = min(self.smallest, float(values.min()))
        self.largest = max(self.largest, float(values.max()))
        self._add_moments(values)
        for bins, some in zip(self.bins, (values[values > 0], -values[values < 0]), strict=True):
            decades = np.log10(some) - LOWEST_DECADE
            places = (decades * BINS_PER_DECADE).astype(np.int64)
            bins += np.bincount(places, minlength=len(bins))

    def _add_moments(self, values: Floats) -> None:
        # Chan, Golub & LeVeque 1979: pieces are joined without cancellation.
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(values.mean())
            squares = float(np.square(values - mean).sum())
            total, step = self.num_finite + values.size, mean - self.mean
            self.squares += squares + step * step * self.num_finite * values.size / total
            self.mean += step * values.size / total
        self.num_finite = total

    @property
    def deviation(self) -> float:
        if not self.num_finite:
            return float("nan")
        return float(np.sqrt(self.squares / self.num_finite))


class _Cells:
    """The extreme scores of the cells of a heat map."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._rows, self._columns = min(shape[0], MOST_ROWS), min(shape[1], MOST_COLUMNS)
        cells = (self._rows, self._columns)
        self._highest, self._lowest = np.full(cells, -np.inf), np.full(cells, np.inf)
        self._is_finite = np.ones(cells, bool)

    def add(self, piece: Piece) -> None:
        rows, row_starts = _bins(piece.rows, self._shape[0], self._rows)
        columns, column_starts = _bins(piece.columns, self._shape[1], self._columns)
        is_finite = np.isfinite(piece.values)
        values = np.where(is_finite, piece.values, 0.0)

        def reduced(by: np.ufunc, some: npt.NDArray[np.generic]) -> Floats:
            within: Floats = by.reduceat(by.reduceat(some, column_starts, axis=1), row_starts)
            return within

        highest, lowest = self._highest[rows, columns], self._lowest[rows, columns]
        np.maximum(highest, reduced(np.maximum, values), out=highest)
        np.minimum(lowest, reduced(np.minimum, values), out=lowest)
        self._is_finite[rows, columns] &= reduced(np.logical_and, is_finite).astype(bool)

    def strongest(self) -> Floats:
        strongest = np.where(self._highest >= -self._lowest, self._highest, self._lowest)
        return np.where(self._is_finite, strongest, np.nan)


def _bins(points: slice, total: int, bins: int) -> tuple[slice, Integers]:
    """The bins in which consecutive points lie, and where each begins among these points."""
    of_point = np.arange(points.start, points.stop) * bins // total
    first, last = int(of_point[0]), int(of_point[-1])
    return slice(first, last + 1), np.searchsorted(of_point, np.arange(first, last + 1))


class _Top:
    """The largest finite scores of one sign in a row."""

    def __init__(self, most: int, *, sign: int) -> None:
        self._most, self._sign = most, sign
        self._indices: Integers = np.zeros(0, np.int64)
        self._values: Floats = np.zeros(0)

    def add(self, row: Floats, start: int) -> None:
        wanted = np.flatnonzero(np.isfinite(row) & (self._sign * row > 0))
        if len(self._values) == self._most:
            wanted = wanted[self._sign * row[wanted] >= self._sign * self._values[-1]]
        indices = np.concatenate([self._indices, wanted + start])
        values = np.concatenate([self._values, row[wanted]])
        # By value, and of equal ones the earlier point first, in whatever order pieces come.
        order = np.lexsort((indices, -self._sign * values))[: self._most]
        self._indices, self._values = indices[order], values[order]

    def extremes(self) -> Extremes:
        return Extremes(self._indices, self._values)
