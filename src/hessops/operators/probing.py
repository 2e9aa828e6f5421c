"""Products with random signs and with unit vectors, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hessops.operators.base import DENSE_CHUNK_BYTES, TensorOperator
from hessops.randomness import rademacher

# Told how many products have just been computed.
Advance = Callable[[int], object]


def rademacher_products(
    operator: TensorOperator, count: int, generator: torch.Generator, advance: Advance | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random signs and A times them, both ``(k, n)`` float64; one pass over the data for a chunk.

    Args:
        operator: A.
        count: Vectors in all chunks together.
        generator: Draws the signs.
        advance: Told how many products a chunk took.
    """
    linear, size = _for_chunks(operator, count), operator.input_size
    for start, stop in _chunks(operator, count):
        signs = rademacher(
            (stop - start, size), generator, dtype=operator.dtype, device=operator.device
        )
        products = linear.apply(signs)
        if advance is not None:
            advance(stop - start)
        yield signs.double(), products.double()


def unit_products(
    operator: TensorOperator, advance: Advance | None = None
) -> Iterator[tuple[int, Tensor]]:
    """All columns of A in chunks: the first of each chunk, and the columns as rows, float64.

    Args:
        operator: A.
        advance: Told how many products a chunk took.
    """
    size = operator.input_size
    linear = _for_chunks(operator, size)
    for start, stop in _chunks(operator, size):
        rows = torch.zeros(stop - start, size, dtype=operator.dtype, device=operator.device)
        rows.diagonal(start).fill_(1)
        products = linear.apply(rows)
        if advance is not None:
            advance(stop - start)
        yield start, products.double()


def exact_diagonal(operator: TensorOperator, advance: Advance | None = None) -> Tensor:
    """The diagonal ``(n,)`` float64 by n products; the matrix is never held as a whole."""
    parts = [products.diagonal(start) for start, products in unit_products(operator, advance)]
    return torch.cat(parts)


def probed_diagonal(
    operator: TensorOperator, count: int, generator: torch.Generator, advance: Advance | None = None
) -> tuple[Tensor, Tensor]:
    r"""The mean of :math:`z \odot Az` over random signs z, and its standard error.

    Bekas, Kokiopoulou & Saad (2007), whose denominators :math:`\sum z \odot z` are the number of
    probes for random signs.

    Args:
        operator: A.
        count: Probes.
        generator: Draws them.
        advance: Told how many products a chunk took.

    Returns:
        Two float64 tensors ``(n,)``; the standard error of a single probe is zero, for want of
        another to compare it with.

    Example:
        >>> import torch
        >>> from hessops import MatrixOperator
        >>> from hessops.operators.probing import probed_diagonal
        >>> A = MatrixOperator(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
        >>> mean, error = probed_diagonal(A, 4, torch.Generator().manual_seed(0))
        >>> mean, error.round(decimals=4)
        (tensor([2., 3.], dtype=torch.float64), tensor([0.5774, 0.5774], dtype=torch.float64))
    """
    moments = Moments()
    for signs, products in rademacher_products(operator, count, generator, advance):
        moments.add(signs * products)
    return moments.mean, moments.standard_error


class Moments:
    """Mean and variance of rows that come in chunks, without keeping them.

    Example:
        >>> import torch
        >>> from hessops.operators.probing import Moments
        >>> moments = Moments()
        >>> moments.add(torch.tensor([[1.0], [2.0]]))
        >>> moments.add(torch.tensor([[6.0]]))
        >>> moments.mean, moments.standard_error  # of 1, 2 and 6: the variance is 7
        (tensor([3.]), tensor([1.5275]))
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Tensor) -> None:
        """Takes in the rows of a chunk, by the update of Chan, Golub & LeVeque (1983)."""
        mean = rows.mean(dim=0)
        squares = (rows - mean).square().sum(dim=0)
        if self.count == 0:
            self.count, self.mean, self._squares = len(rows), mean, squares
            return
        total = self.count + len(rows)
        difference = mean - self.mean
        self._squares += squares + difference.square() * (self.count * len(rows) / total)
        self.mean += difference * (len(rows) / total)
        self.count = total

    @property
    def standard_error(self) -> Tensor:
        """Of the mean, by the unbiased variance; zero for a single row."""
        return (self._squares / (self.count * max(self.count - 1, 1))).sqrt()


def chunk_length(operator: TensorOperator) -> int:
    """How many vectors of float64 fit the memory that a chunk may take."""
    return max(1, DENSE_CHUNK_BYTES // (operator.input_size * 8))


def _chunks(operator: TensorOperator, count: int) -> Iterator[tuple[int, int]]:
    length = chunk_length(operator)
    for start in range(0, count, length):
        yield start, min(start + length, count)


def _for_chunks(operator: TensorOperator, count: int) -> TensorOperator:
    """The operator, with its graphs retained where there are several passes over the data."""
    return operator.linearize() if count > chunk_length(operator) else operator
