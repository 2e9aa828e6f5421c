"""How many vectors may share one vectorised backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from hessops.functional.memory import RetainedBytes
from hessops.functional.products import LinearFunction, Stack
from hessops.space import ParameterSpace

# Memory that the columns of one stacked product may take beside the graph itself.
COLUMN_BYTES = 2**29


def columns_that_fit(space: ParameterSpace, retained_bytes: int) -> int:
    """Columns of a vectorised backward pass that fit `COLUMN_BYTES`, at least one.

    Each holds its own copy of the activations' gradients, about as large as what the graph
    retains, and a few vectors of the space.

    Args:
        space: Where the vectors live.
        retained_bytes: What the graph retains, as `hessops.functional.memory.RetainedBytes` counts.

    Example:
        >>> import torch
        >>> from hessops import ParameterSpace
        >>> from hessops.functional.columns import columns_that_fit
        >>> space = ParameterSpace.from_model(torch.nn.Linear(3, 2))
        >>> columns_that_fit(space, retained_bytes=2**28)
        1
    """
    vector_bytes = space.size * space.dtype.itemsize
    return max(1, COLUMN_BYTES // (4 * vector_bytes + retained_bytes + 1))


def in_column_chunks(product: LinearFunction, stack: Stack, chunk: int) -> Stack:
    """A product with a stack, computed for some of its vectors at a time.

    Args:
        product: A linear map of stacks.
        stack: ``{name: (k, *shape)}``.
        chunk: The most vectors that `product` gets at once, at least 1.

    Returns:
        ``{name: (k, *shape)}``, whatever the chunk.

    Example:
        >>> import torch
        >>> from hessops.functional.columns import in_column_chunks
        >>> in_column_chunks(lambda s: {"x": 2 * s["x"]}, {"x": torch.ones(3, 1)}, 2)["x"].T
        tensor([[2., 2., 2.]])
    """
    num_rows = len(next(iter(stack.values())))
    if num_rows <= chunk:
        return product(stack)
    pieces = [
        product({name: t[start : start + chunk] for name, t in stack.items()})
        for start in range(0, num_rows, chunk)
    ]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in stack}


def chunked(
    linearize: Callable[[], LinearFunction], space: ParameterSpace, chunk: int | None = None
) -> LinearFunction:
    """The map that a traversal of a model yields, with its columns in chunks.

    Args:
        linearize: Traverses the model; what its graph retains is counted.
        space: Where the vectors live.
        chunk: The most vectors at once; ``None`` takes as many as fit.
    """
    retained = RetainedBytes()
    with retained.counting():
        product = linearize()
    return partial(
        in_column_chunks, product, chunk=chunk or columns_that_fit(space, retained.total)
    )
