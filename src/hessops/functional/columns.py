"""How many vectors may share one vectorised backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from hessops.functional.memory import GraphSize, RetainedBytes
from hessops.functional.products import LinearFunction, Stack
from hessops.space import ParameterSpace

# Memory that the columns of one stacked product may take beside the graph itself.
COLUMN_BYTES = 2**29
# On a CPU several columns at once save the fixed cost of an operation and lose its data from the
# processor's cache. Together they should read about this much in an operation. With 32 columns of
# small perceptrons, convolutional networks and transformers on a core of an x86 server, the chunk
# that this gives took 1.0 to 1.4 of the time of the best of 1, 2, 4, 8, 16 and 32, where one at a
# time are replayed from a record (benchmarks/columns.py); one at a time took up to 8.3. With large
# batches it is the other way round: all columns at once took up to 2.4 times as long as one after
# the other.
OPERATION_BYTES = 2**18
# Fewer columns than this do not pay for the vectorised pass, which copies and cannot fuse as much.
FEWEST_COLUMNS = 4


def columns_that_fit(
    space: ParameterSpace, retained_bytes: int, num_tensors: int | None = None
) -> int:
    """Columns of a vectorised backward pass, at least one: what fits, and what is fast.

    Each holds its own copy of the activations' gradients, about as large as what the graph
    retains, and a few vectors of the space; `COLUMN_BYTES` bounds them. On a CPU columns of large
    operations go one by one, those of small ones together (`OPERATION_BYTES`).

    Args:
        space: Where the vectors live.
        retained_bytes: What the graph retains, as `hessops.functional.memory.RetainedBytes` counts.
        num_tensors: In how many tensors; ``None`` looks at the memory only.

    Example:
        >>> import torch
        >>> from hessops import ParameterSpace
        >>> from hessops.functional.columns import columns_that_fit
        >>> space = ParameterSpace.from_model(torch.nn.Linear(3, 2))
        >>> columns_that_fit(space, retained_bytes=2**28)
        1
        >>> columns_that_fit(space, retained_bytes=2**20, num_tensors=2)
        1
        >>> columns_that_fit(space, retained_bytes=2**16, num_tensors=4)
        8
    """
    vector_bytes = space.size * space.dtype.itemsize
    most = max(1, COLUMN_BYTES // (4 * vector_bytes + retained_bytes + 1))
    if num_tensors is None or space.device.type != "cpu":
        return most
    fast = int(OPERATION_BYTES / (GraphSize(retained_bytes, num_tensors).mean_bytes + 1))
    if fast < FEWEST_COLUMNS:
        return 1
    # A power of two, which divides the usual numbers of vectors.
    return min(most, 1 << (fast.bit_length() - 1))


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
    size = retained.size
    chunk = chunk or columns_that_fit(space, size.num_bytes, size.num_tensors)
    return partial(in_column_chunks, product, chunk=chunk)
