"""Scores in pieces that fit into memory, whatever holds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hessops.errors import ArgumentTypeError, DtypeError, ShapeError
from hessops.influence.lazy import LazyInfluences

# Scores that are read at once, where the store does not have larger chunks.
PIECE = 2**20


class SlicedArray(Protocol):
    """An array with a shape of which rectangles can be read: torch, numpy, zarr, h5py, dask."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(m, n)``."""

    def __getitem__(self, where: Any, /) -> Any:
        """The numbers in a pair of slices."""


@dataclass(frozen=True)
class Piece:
    """Some of the scores.

    Attributes:
        rows: Which test points.
        columns: Which training points.
        values: Their scores, ``(rows, columns)`` float64.
    """

    rows: slice
    columns: slice
    values: npt.NDArray[np.float64]


def checked_shape(scores: object) -> tuple[int, int]:
    """The numbers of test points and training points.

    Raises:
        ArgumentTypeError: `scores` is no array.
        ShapeError: It has other dimensions than two, or no entries.
    """
    if isinstance(scores, np.ma.MaskedArray):
        raise ArgumentTypeError("scores must have no mask: fill it")
    shape = getattr(scores, "shape", None)
    is_read_by_slices = isinstance(scores, LazyInfluences) or hasattr(scores, "__getitem__")
    if shape is None or not is_read_by_slices:
        raise ArgumentTypeError(
            "scores must be an array with one row for each test point, or influences of a "
            f"calculator, got {type(scores).__name__}"
        )
    if len(shape) != 2:
        hint = ": pass scores[None]" if len(shape) == 1 else "; a report is of mode UP"
        raise ShapeError(f"scores has shape {tuple(shape)}, expected (m, n){hint}")
    m, n = int(shape[0]), int(shape[1])
    if not m or not n:
        raise ShapeError(f"scores has shape ({m}, {n}): there is nothing to report")
    return m, n


def pieces(scores: SlicedArray | LazyInfluences) -> Iterator[Piece]:
    """All scores, each once.

    Raises:
        ShapeError: A piece has another shape than that of its slices.
        DtypeError: The scores are no real numbers.
    """
    if isinstance(scores, LazyInfluences):
        for chunk in scores:
            yield _piece(chunk.test, chunk.train, chunk.values)
        return
    m, n = checked_shape(scores)
    height, width = _extent(m, n, getattr(scores, "chunks", None))
    for top in range(0, m, height):
        for left in range(0, n, width):
            rows = slice(top, min(top + height, m))
            columns = slice(left, min(left + width, n))
            yield _piece(rows, columns, scores[rows, columns])


def _extent(m: int, n: int, chunks: object) -> tuple[int, int]:
    """How much is read at once: whole chunks of the store, so that none is read twice."""
    height, width = 1, 1
    if isinstance(chunks, tuple) and len(chunks) == 2:
        first, second = chunks
        if isinstance(first, int) and isinstance(second, int) and min(first, second) > 0:
            height, width = first, second
    width = min(width * max(1, PIECE // (height * width)), n)
    return height * max(1, PIECE // (height * width)), width


def _piece(rows: slice, columns: slice, found: object) -> Piece:
    if isinstance(found, Tensor):
        if found.is_complex() or found.dtype is torch.bool:
            raise DtypeError(f"scores must be real numbers, got {found.dtype}")
        values = found.detach().cpu().double().numpy()
    else:
        array = np.asarray(found)
        if array.dtype.kind not in "fiu":
            raise DtypeError(f"scores must be real numbers, got {array.dtype}")
        values = array.astype(np.float64)
    expected = (rows.stop - rows.start, columns.stop - columns.start)
    if values.shape != expected:
        raise ShapeError(
            f"scores[{rows.start}:{rows.stop}, {columns.start}:{columns.stop}] has shape "
            f"{values.shape}, expected {expected}"
        )
    return Piece(rows, columns, values)
