"""The recursion of LiSSA: a Neumann series over sampled batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

from torch import Tensor

from hessops.errors import ConvergenceWarning, NonFiniteProductError

RowsProduct = Callable[[Tensor], Tensor]
# The updates of a recursion that converges shrink; noise of sampled batches may enlarge them.
GROWTH_LIMIT = 10


def lissa_recursion(
    products: Iterable[RowsProduct],
    rhs: Tensor,
    *,
    dampen: float,
    scale: float,
    start: Tensor | None = None,
) -> Tensor:
    r"""Runs :math:`h \leftarrow b + (1 - d) h - A_t h / s` and returns :math:`h / s`.

    (Agarwal, Bullins & Hazan 2017; Koh & Liang 2017.) With the same A in every step, and
    eigenvalues of A/s + dI between 0 and 2, it tends to :math:`(A + d s I)^{-1} b`.

    Args:
        products: One map of rows ``(k, n)`` per step.
        rhs: b, ``(k, n)``.
        dampen: d.
        scale: s.
        start: h at the beginning; ``None`` is b.

    Raises:
        NonFiniteProductError: The recursion diverged to infinity, or a product is NaN.

    Example:
        >>> import torch
        >>> from hessops.solvers.lissa import lissa_recursion
        >>> steps = [lambda rows: 2 * rows] * 60
        >>> lissa_recursion(steps, torch.ones(1, 1), dampen=0.0, scale=4.0)
        tensor([[0.5000]])
    """
    current = rhs if start is None else start
    first_update = last_update = None
    for product in products:
        previous = current
        current = rhs + (1 - dampen) * current - product(current) / scale
        last_update = (current - previous).norm(dim=1)
        first_update = last_update if first_update is None else first_update
        if not last_update.isfinite().all():
            raise NonFiniteProductError(
                f"the recursion of LiSSA diverged: scaling ({scale:g}) must exceed half of the "
                "largest eigenvalue of every sampled batch, and negative curvature needs damping; "
                "raise one of them"
            )
    if first_update is not None and last_update is not None:
        _warn_of_growth(first_update, last_update, scale)
    return current / scale


def _warn_of_growth(first: Tensor, last: Tensor, scale: float) -> None:
    growing = last > GROWTH_LIMIT * first
    if growing.any():
        warnings.warn(
            f"the updates of LiSSA grew more than {GROWTH_LIMIT}-fold for {int(growing.sum())} of "
            f"{len(first)} right-hand sides: the recursion diverges or its batches are too noisy. "
            f"Raise scaling (now {scale:g}), damping or the batch size",
            ConvergenceWarning,
            stacklevel=4,
        )
