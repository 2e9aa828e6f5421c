"""Products of a batch's matrix in a lower precision than that of the vectors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from hessops.batch.inverse_harmonic_mean import InverseHarmonicMeanBatchOperation
from hessops.batch.model import ModelBatchOperation
from hessops.batch.operation import BatchOperation
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    HessopsError,
    ModelError,
    StructureError,
)
from hessops.functional.memory import GraphSizes
from hessops.functional.precision import powers_of_two
from hessops.functional.products import LinearFunction, Stack, StackedGradient
from hessops.nested import map_tensors, rounded
from hessops.printed import Node
from hessops.streaming import Batch

# float16 is left out: the gradient of a mean over some thousand points may be below all that it
# holds, and would be zero without a word.
_LOWER = {
    torch.float64: (torch.float32, torch.bfloat16),
    torch.float32: (torch.bfloat16,),
}


class LowerPrecisionBatchOperation(ModelBatchOperation):
    r"""The batch operation of a model, with its products computed in a lower precision.

    Model, loss, batch and vectors are rounded to `product_dtype`, and the product is widened again:
    the operation acts on the same vectors as the one it is made of, with an error of about
    :math:`c\,\epsilon\,\lVert m(b)\rVert \lVert v\rVert` for the :math:`\epsilon` of
    `product_dtype`. Each vector is scaled by a power of two before it is rounded, so that a tiny or
    huge one loses nothing but digits.

    On every batch of a first pass the claims of `Objective.check` are put to the test twice: in the
    precision of the vectors, and with the tolerances of `product_dtype` for the rounded model.

    Args:
        operation: A batch operation of a model in float64 or float32; it is not changed, and its
            `refresh` leaves this one as it is.
        product_dtype: A lower dtype: ``torch.float32`` or ``torch.bfloat16``.

    Raises:
        ArgumentTypeError: `operation` is no `ModelBatchOperation`, or `product_dtype` no dtype.
        ArgumentError: `product_dtype` is not lower than the dtype of `operation`, or float16.
        StructureError: The operation is an inverse, whose rounding would be divided by λ.
        NonFiniteError: A parameter or buffer is beyond the range of `product_dtype`.

    Example:
        >>> import torch
        >>> from hessops import HessianBatchOperation
        >>> from hessops.batch.precision import LowerPrecisionBatchOperation
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> exact = HessianBatchOperation(model, torch.nn.MSELoss())
        >>> operation = LowerPrecisionBatchOperation(exact, torch.bfloat16)
        >>> x = torch.full((4, 1), 1.01, dtype=torch.float64)  # 1.0078125 in bfloat16
        >>> operation.apply((x, torch.zeros_like(x)), torch.ones(1, dtype=torch.float64))
        tensor([2.0312], dtype=torch.float64)
    """

    def __init__(self, operation: ModelBatchOperation, product_dtype: torch.dtype) -> None:
        if not isinstance(operation, ModelBatchOperation):
            raise ArgumentTypeError(
                f"operation must be a ModelBatchOperation, got {type(operation).__name__}"
            )
        if isinstance(operation, InverseHarmonicMeanBatchOperation):
            raise StructureError(
                f"{type(operation).__name__} has no products in lower precision: it is an inverse, "
                "and rounding would be divided by its regularization"
            )
        if isinstance(operation, LowerPrecisionBatchOperation):
            operation = operation.exact
        BatchOperation.__init__(
            self,
            operation.space,
            symmetric=operation.symmetric,
            positive_semidefinite=operation.positive_semidefinite,
        )
        self.product_dtype = checked_product_dtype(product_dtype, operation.space.dtype)
        self.mode = operation.mode
        self.chunk_size = operation.chunk_size
        self._graph_sizes = GraphSizes()
        self._compiled = None
        # The check of the rounded operation is the one that looks at symmetry.
        self._symmetry_is_checked = True
        self._hold(copy.copy(operation))

    def _hold(self, exact: ModelBatchOperation) -> None:
        self.exact = exact
        self.objective = exact.objective
        self.space = exact.space
        self._stacked_gradient = StackedGradient()
        self.rounded = copy.copy(exact)
        self.rounded.objective = exact.objective.in_precision(self.product_dtype)
        self.rounded.space = self.rounded.objective.space
        self.rounded._stacked_gradient = self._stacked_gradient
        self.rounded._symmetry_is_checked = exact.symmetric_by_construction

    def _linearize(self, batch: Batch, *, forward_mode: bool) -> LinearFunction:
        product = self.rounded._linearize(self._rounded_batch(batch), forward_mode=forward_mode)
        return partial(self._widened, product)

    def _widened(self, product: LinearFunction, stack: Stack) -> Stack:
        """A product of vectors that are rounded, in their own scale and dtype again."""
        rows = self.space.flatten(stack)
        scales = powers_of_two(rows)
        narrow = self.rounded.space.unflatten((rows / scales).to(self.product_dtype))
        return {name: _times(scales, t.to(rows.dtype)) for name, t in product(narrow).items()}

    def _rounded_batch(self, batch: Batch) -> Batch:
        def narrow(tensor: Tensor) -> Tensor:
            return rounded(tensor, self.product_dtype)

        return replace(batch, x=map_tensors(narrow, batch.x), y=map_tensors(narrow, batch.y))

    def check(self, batch: Batch) -> None:
        """The check of `Objective.check` in both precisions, and that of the rounded operation.

        Raises:
            HessopsError: See `Objective.check`.
            ModelError: The model cannot be computed in `product_dtype`.
        """
        self.objective.check(batch)
        with self._explaining():
            self.rounded.check(self._rounded_batch(batch))

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        advice = (
            f"in {self.product_dtype}, the model and its loss cannot be used although they can in "
            f"{self.space.dtype}: "
        )
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except HessopsError as error:
            error.add_note(f"{advice}use a wider dtype for the products")
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise ModelError(
                f"{advice}{error}. Tensors that a module holds must be its parameters or buffers "
                "to be rounded, and it must not name a dtype"
            ) from error

    def restricted(self, names: Iterable[str]) -> Self:
        """As of `ModelBatchOperation`; both copies of the model are shared."""
        names = list(names)
        fewer = super().restricted(names)
        fewer.exact, fewer.rounded = self.exact.restricted(names), self.rounded.restricted(names)
        fewer.objective = fewer.exact.objective
        return fewer

    def __copy__(self) -> Self:
        """As of `ModelBatchOperation`."""
        twin = super().__copy__()
        twin.exact = copy.copy(self.exact)
        twin.objective = twin.exact.objective
        return twin

    def _move_parts(self, device: torch.device) -> None:
        self.exact, self.rounded = self.exact.to(device), self.rounded.to(device)
        self.objective = self.exact.objective
        self._stacked_gradient = StackedGradient()

    def refresh(self) -> Self:
        """Takes a new copy of the model as it is now, and rounds it, in place; returns itself."""
        self._hold(self.exact.refresh())
        return self

    def _node(self) -> Node:
        exact = self.exact._node()
        return replace(exact, label=f"{exact.label} with products in {self.product_dtype}")


def checked_product_dtype(value: object, dtype: torch.dtype) -> torch.dtype:
    """A dtype in which products may be computed for vectors of `dtype`: one of less precision.

    Raises:
        ArgumentTypeError: Not a dtype.
        ArgumentError: Not float32 or bfloat16, or not lower than `dtype`.
    """
    if not isinstance(value, torch.dtype):
        raise ArgumentTypeError(f"the dtype of products must be a torch.dtype, got {value!r}")
    lower = _LOWER.get(dtype, ())
    if value not in lower:
        names = " or ".join(map(str, lower)) or "there is none"
        raise ArgumentError(
            f"the dtype of products is {value}, but must be lower than that of the vectors, which "
            f"is {dtype}, and not float16, which underflows: {names}"
        )
    return value


def _times(scales: Tensor, stack: Tensor) -> Tensor:
    return stack * scales.reshape(len(scales), *[1] * (stack.ndim - 1))
