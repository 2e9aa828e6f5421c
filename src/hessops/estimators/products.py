"""Products with an operator that are counted and shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hessops.errors import StructureError
from hessops.estimators.arguments import Work, require_operator, shown
from hessops.functional.checks import excess_asymmetry
from hessops.operators.base import TensorOperator
from hessops.randomness import standard_normal
from hessops.validation import require_single_or_double


@dataclass(frozen=True, eq=False)
class CountedProducts:
    """Products with an operator at fixed parameters, made by `counted_products`.

    Attributes:
        operator: A, linearized.
        work: Counts and shows them.
    """

    operator: TensorOperator
    work: Work

    @property
    def count(self) -> int:
        """Vectors that were multiplied so far."""
        return self.work.num_products

    def __call__(self, tensor: Tensor) -> Tensor:
        """A times a vector ``(n,)`` or the rows of ``(k, n)``.

        Raises:
            NonFiniteProductError: The product is NaN or infinite.
        """
        result = self.operator.apply(tensor)
        self.work(1 if tensor.ndim == 1 else len(tensor))
        return result


@contextmanager
def counted_products(
    operator: TensorOperator, name: str, *, total: int | None = None, progress: bool = False
) -> Iterator[CountedProducts]:
    """Products that are counted, behind a progress bar.

    Args:
        operator: A; it is linearized, see `TensorOperator.linearize`.
        name: What the bar says.
        total: How many products there will be, where that is known.
        progress: Shows the bar, in the first of several processes.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator
        >>> from hessops.estimators.products import counted_products
        >>> with counted_products(DiagonalOperator(torch.ones(3)), "ones") as product:
        ...     _ = product(torch.zeros(2, 3))
        >>> product.count
        2
    """
    with shown(operator, total, name, progress) as work:
        yield CountedProducts(operator.linearize(), work)


def checked_operator(operator: object, method: str) -> TensorOperator:
    """An operator of float32 or float64.

    Raises:
        ArgumentTypeError, DeviceError: See `require_operator`.
        DtypeError: Half precision.
    """
    checked = require_operator(operator)
    require_single_or_double(checked.dtype, "operator", method)
    return checked


def require_symmetric(product: CountedProducts, method: str, generator: torch.Generator) -> None:
    """Refuses an operator that is not symmetric; where that is unknown, two products tell.

    Raises:
        StructureError: ⟨u, Av⟩ and ⟨Au, v⟩ differ for two random vectors, or A is known not to be
            symmetric.
    """
    operator = product.operator
    detail = "is not symmetric"
    if operator.symmetric:
        return
    if operator.symmetric is None:
        shape = (2, operator.input_size)
        probes = standard_normal(shape, generator, dtype=operator.dtype, device=operator.device)
        asymmetry = excess_asymmetry(probes, product(probes))
        if asymmetry is None:
            return
        detail += f": ⟨u, Av⟩ and ⟨Au, v⟩ differ by {asymmetry:.1e} relative for random u and v"
    raise StructureError(
        f"operator ({type(operator).__name__}) {detail}; {method} needs a symmetric one: take "
        "(A + A.T) / 2, or A.T @ A for singular values"
    )
