"""Sums and norms that neither overflow nor lose what half precision cannot hold."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed: float32 for half precision."""
    return _WIDER.get(dtype, dtype)


def largest_entries(rows: Tensor) -> Tensor:
    """The largest absolute value of each row, ``(k, 1)``; NaN where a row holds one.

    From the largest and the smallest entry, which takes no copy of the rows. It is finite exactly
    where all entries are.
    """
    return rows.amax(dim=1, keepdim=True).maximum(-rows.amin(dim=1, keepdim=True))


def finite_rows(rows: Tensor) -> Tensor:
    """Which rows hold neither NaN nor infinity, ``(k,)``."""
    return largest_entries(rows).isfinite().squeeze(1)


def scaled_rows(rows: Tensor, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows divided by their largest entry, and those entries ``(k, 1)``; zero rows stay zero.

    The norm of a row is that of the scaled one times the entry, with no square out of range.

    Args:
        rows: The rows, ``(k, n)``.
        out: Where the scaled ones are written; ``None`` makes a new tensor.
    """
    largest = largest_entries(rows)
    return torch.div(rows, torch.where(largest > 0, largest, 1.0), out=out), largest


def safe_norms(rows: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Norms of rows whose squares may overflow or underflow, ``(k,)``.

    `out` is overwritten with the scaled rows; ``None`` makes a new tensor for them.
    """
    scaled, largest = scaled_rows(rows, out=out)
    norms: Tensor = scaled.norm(dim=1) * largest.squeeze(1)
    return norms


def powers_of_two(rows: Tensor) -> Tensor:
    """The power of two below the largest entry of each row, ``(k, 1)``; 1 for a zero row.

    Dividing by it is exact and keeps the squares in norms from underflowing: in float32 the square
    of a gradient of size 1e-25 is zero.
    """
    largest = largest_entries(rows)
    _, exponent = torch.frexp(torch.where(largest > 0, largest, 1.0))
    powers = torch.ldexp(torch.ones_like(largest), exponent - 1)
    return powers.clamp(min=torch.finfo(rows.dtype).tiny)
