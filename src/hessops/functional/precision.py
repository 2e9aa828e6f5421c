"""Sums and norms that neither overflow nor lose what half precision cannot hold."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed: float32 for half precision."""
    return _WIDER.get(dtype, dtype)


def scaled_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their largest entry, and those entries ``(k, 1)``; zero rows stay zero.

    The norm of a row is that of the scaled one times the entry, with no square out of range.
    """
    largest = rows.abs().amax(dim=1, keepdim=True)
    return rows / torch.where(largest > 0, largest, 1.0), largest
