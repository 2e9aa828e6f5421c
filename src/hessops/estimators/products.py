"""Products with an operator that are counted and shown."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from hessops.errors import ArgumentTypeError, StructureError
from hessops.functional.checks import excess_asymmetry
from hessops.operators.base import TensorOperator
from hessops.progress import progress_bar
from hessops.randomness import standard_normal
from hessops.validation import require_single_or_double


class CountedProducts:
    """Products with an operator at fixed parameters, for as long as a ``with`` statement takes.

    Args:
        operator: A; it is linearized, see `TensorOperator.linearize`.
        description: What the progress bar says.
        total: How many products there will be, where that is known.
        progress: Shows the bar, in the first of several processes.

    Attributes:
        count: Vectors that were multiplied so far.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator
        >>> from hessops.estimators.products import CountedProducts
        >>> with CountedProducts(DiagonalOperator(torch.ones(3)), "ones") as product:
        ...     _ = product(torch.zeros(2, 3))
        >>> product.count
        2
    """

    def __init__(
        self,
        operator: TensorOperator,
        description: str,
        *,
        total: int | None = None,
        progress: bool = False,
    ) -> None:
        self.operator = operator.linearize()
        self.count = 0
        show = progress and operator.processes.rank == 0
        self._bar = progress_bar(description, "product", total, show=show)

    def __enter__(self) -> Self:
        self._shown = self._bar.__enter__()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.__exit__(error_type, error, traceback)

    def __call__(self, tensor: Tensor) -> Tensor:
        """A times a vector ``(n,)`` or the rows of ``(k, n)``.

        Raises:
            NonFiniteProductError: The product is NaN or infinite.
        """
        result = self.operator.apply(tensor)
        number = 1 if tensor.ndim == 1 else len(tensor)
        self.count += number
        self._shown.advance(number)
        return result


def checked_operator(operator: object, method: str) -> TensorOperator:
    """An operator of float32 or float64.

    Raises:
        ArgumentTypeError: Something else.
        DtypeError: Half precision.
    """
    if not isinstance(operator, TensorOperator):
        raise ArgumentTypeError(
            f"operator must be a TensorOperator, got {type(operator).__name__}; wrap a matrix as "
            "MatrixOperator(matrix)"
        )
    require_single_or_double(operator.dtype, "operator", method)
    return operator


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
