"""What the estimators check, and how they count and show their work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DeviceError,
    MemoryLimitError,
    NonFiniteProductError,
    StructureError,
)
from hessops.estimators.estimate import Estimate
from hessops.operators.base import TensorOperator
from hessops.progress import Bar, progress_bar
from hessops.validation import available_bytes, is_finite

DEFAULT_PRODUCTS = 100


class Work:
    """Counts products, and shows them.

    Attributes:
        num_products: How many there were.
    """

    def __init__(self, bar: Bar) -> None:
        self.num_products = 0
        self._bar = bar

    def __call__(self, num_products: int) -> None:
        """Some products more."""
        self.num_products += num_products
        self._bar.advance(num_products)

    def expect(self, total: int) -> None:
        """How many products there will be, where that is known better now."""
        self._bar.expect(total)


@contextmanager
def shown(operator: TensorOperator, total: int | None, name: str, progress: bool) -> Iterator[Work]:
    """Work behind a progress bar, which is silent unless asked and in all processes but one."""
    show = progress and operator.processes.rank == 0
    with progress_bar(name, "product", total, show=show) as bar:
        yield Work(bar)


def require_operator(operator: object) -> TensorOperator:
    """The operator, where there is something to estimate.

    Raises:
        ArgumentTypeError: `operator` is not a `TensorOperator`.
        DeviceError: It is on the meta device.
    """
    if not isinstance(operator, TensorOperator):
        raise ArgumentTypeError(
            f"operator must be a TensorOperator, got {type(operator).__name__}; wrap a matrix as "
            "MatrixOperator(matrix)"
        )
    if operator.device.type == "meta":
        raise DeviceError("operator is on the meta device, where there are no values to estimate")
    return operator


def require_choice(value: object, choices: Sequence[object], name: str) -> None:
    """Raises where an argument is none of its possible values.

    Raises:
        ArgumentError: That.
    """
    # True equals 1, and 2.0 equals 2, which they do not mean.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ArgumentError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def require_products(num_products: int, minimum: int, method: str) -> None:
    """Raises where a method has too few products for what it does.

    Raises:
        ArgumentError: That.
    """
    if num_products < minimum:
        raise ArgumentError(
            f"num_products must be >= {minimum} for {method!r}, whose standard error takes two "
            f"samples, got {num_products}"
        )


def require_memory(operator: TensorOperator, num_vectors: int, advice: str) -> None:
    """Raises where vectors of float64 would not fit into half of the free memory.

    Raises:
        MemoryLimitError: That.
    """
    # What is free may differ from process to process.
    with operator.processes.together():
        needed, limit = 8 * num_vectors * operator.input_size, available_bytes(operator.device) // 2
        if needed > limit:
            raise MemoryLimitError(
                f"{num_vectors} vectors of {operator.input_size:,} entries in float64 take "
                f"{needed:,} bytes, more than the {limit:,} that may be used; {advice}"
            )


def transpose_of(operator: TensorOperator, what: str, advice: str) -> TensorOperator:
    """Aᵀ, for what needs it.

    Raises:
        StructureError: A is not known to be symmetric and has no adjoint.
    """
    try:
        return operator.T
    except StructureError as error:
        raise StructureError(f"{what} needs products with the transpose: {error}; {advice}") from (
            error
        )


def estimate_of(value: Tensor, standard_error: Tensor, num_products: int, method: str) -> Estimate:
    """An `Estimate`, of numbers where the tensors have no dimension.

    Raises:
        NonFiniteProductError: The products are finite, but their sums are not.
    """
    if not (is_finite(value) and is_finite(standard_error)):
        raise NonFiniteProductError(
            f"the estimate by {method!r} overflows float64; scale the operator down"
        )
    if value.ndim == 0:
        return Estimate(value.item(), standard_error.item(), num_products, method)
    return Estimate(value, standard_error, num_products, method)
