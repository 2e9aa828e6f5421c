"""Sums, multiples, compositions, shifts and transposes of operators."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from math import log
from typing import TypeVar

import torch
from torch import Tensor

from hessops.errors import (
    DeviceError,
    DtypeError,
    ShapeError,
    SingularOperatorError,
    StructureError,
)
from hessops.operators.base import CompositeOperator, TensorOperator, no_adjoint
from hessops.operators.diagonal import IdentityOperator, every_known
from hessops.operators.inverse import ClosedFormInverse, InverseOperator
from hessops.space import ParameterSpace

PartMap = Callable[[TensorOperator], TensorOperator]
_Linear = TypeVar("_Linear", float, Tensor)


class LinearCombination(CompositeOperator):
    """A sum of multiples of operators; abstract.

    What is linear in the operator is exact for it where it is for all terms.
    """

    @abstractmethod
    def _weighted(self) -> Sequence[tuple[float, TensorOperator]]:
        """The hook: c and B of each term c·B."""

    def _linear_terms(self) -> Sequence[tuple[float, TensorOperator]]:
        return [
            (factor * inner, part)
            for factor, term in self._weighted()
            for inner, part in term._linear_terms()
        ]

    def _exact_diagonal(self) -> Tensor | None:
        known = every_known([term._exact_diagonal() for _, term in self._weighted()])
        return None if known is None else _summed(self._multiples(known))

    def _exact_trace(self) -> float | None:
        known = every_known([term._exact_trace() for _, term in self._weighted()])
        return None if known is None else sum(self._multiples(known))

    def _multiples(self, values: Sequence[_Linear]) -> list[_Linear]:
        factors = [factor for factor, _ in self._weighted()]
        return [factor * value for factor, value in zip(factors, values, strict=True)]


class SumOperator(LinearCombination):
    r"""The sum :math:`\sum_i A_i`, which ``A + B`` returns.

    Args:
        terms: At least one operator, all on the same vectors.

    Example:
        >>> import torch
        >>> from hessops import MatrixOperator
        >>> A = MatrixOperator(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        >>> total = A + A
        >>> type(total).__name__, total.apply(torch.ones(2))
        ('SumOperator', tensor([6., 6.]))
    """

    def __init__(self, terms: Sequence[TensorOperator]) -> None:
        self.terms = tuple(terms)
        symmetric = [term.symmetric for term in self.terms]
        # The sum of two operators that are not symmetric may well be; of one, it is not.
        is_symmetric = True if all(symmetric) else None
        if symmetric.count(False) == 1 and symmetric.count(True) == len(symmetric) - 1:
            is_symmetric = False
        super().__init__(
            self.terms[0].input_size,
            self.terms[0].dtype,
            self.terms[0].device,
            symmetric=is_symmetric,
            positive_semidefinite=all(t.positive_semidefinite for t in self.terms) or None,
            space=_common_space(self.terms),
        )

    def _without_shift(self) -> tuple[TensorOperator, float]:
        parts = [term._without_shift() for term in self.terms]
        shift = sum(part_shift for _, part_shift in parts)
        return (SumOperator([part for part, _ in parts]), shift) if shift else (self, 0.0)

    def _weighted(self) -> Sequence[tuple[float, TensorOperator]]:
        return [(1.0, term) for term in self.terms]

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return _summed([term._product(rows) for term in self.terms])

    def _apply_rows_adjoint(self, rows: Tensor) -> Tensor:
        return _summed([term._adjoint_product(rows) for term in self.terms])

    def _mapped(self, function: PartMap) -> TensorOperator:
        return SumOperator([function(term) for term in self.terms])

    def _children(self) -> Sequence[TensorOperator]:
        return self.terms


class ScaledOperator(LinearCombination):
    """The multiple c·A, which ``c * A``, ``A / c`` and ``-A`` return.

    Args:
        operator: A.
        factor: c, a finite number.
        space: The parameters that the entries stand for; ``None`` takes those of A.

    Example:
        >>> import torch
        >>> from hessops import MatrixOperator
        >>> A = MatrixOperator(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        >>> multiple = 2 * A
        >>> type(multiple).__name__, multiple.apply(torch.ones(2))
        ('ScaledOperator', tensor([6., 6.]))
    """

    def __init__(
        self, operator: TensorOperator, factor: float, *, space: ParameterSpace | None = None
    ) -> None:
        self.operator = operator
        self.factor = factor
        super().__init__(
            operator.input_size,
            operator.dtype,
            operator.device,
            symmetric=True if factor == 0 else operator.symmetric,
            positive_semidefinite=_scaled_definiteness(operator.positive_semidefinite, factor),
            space=space or operator.space,
        )

    def _weighted(self) -> Sequence[tuple[float, TensorOperator]]:
        return [(self.factor, self.operator)]

    def _exact_eigenvalues(self) -> Tensor | None:
        inner = self.operator._exact_eigenvalues()
        return None if inner is None else self.factor * inner

    def _exact_squared_norm(self) -> float | None:
        inner = self.operator._exact_squared_norm()
        return None if inner is None else self.factor**2 * inner

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return self.operator._product(rows) * self.factor

    def _apply_rows_adjoint(self, rows: Tensor) -> Tensor:
        return self.operator._adjoint_product(rows) * self.factor

    def _identity_factor(self) -> float | None:
        inner = self.operator._identity_factor()
        return None if inner is None else self.factor * inner

    def _without_shift(self) -> tuple[TensorOperator, float]:
        inner, shift = self.operator._without_shift()
        return (self.factor * inner, self.factor * shift) if shift else (self, 0.0)

    def _closed_form_inverse(self, shift: float) -> TensorOperator | None:
        if self.factor == 0:
            raise SingularOperatorError("0 * A is singular")
        # (cA + sI)^-1 = (A + s/c I)^-1 / c
        inner = self.operator._closed_form_inverse(shift / self.factor)
        return None if inner is None else inner / self.factor

    def _exact_logdet(self, scale: float, shift: float) -> float | None:
        return self.operator._exact_logdet(scale * self.factor, shift)

    def _mapped(self, function: PartMap) -> TensorOperator:
        operator = function(self.operator)
        return ScaledOperator(operator, self.factor, space=self._space_on(operator.device))

    def _children(self) -> Sequence[TensorOperator]:
        return (self.operator,)

    def _label(self) -> str:
        return f"ScaledOperator({self.factor:g})"


class ShiftedOperator(LinearCombination):
    """The sum A + λI, which ``A.shift(λ)`` returns; solvers tell it apart from A.

    Args:
        operator: A.
        shift_value: λ, a finite number.
        space: The parameters that the entries stand for; ``None`` takes those of A.

    Example:
        >>> import torch
        >>> from hessops import MatrixOperator
        >>> A = MatrixOperator(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        >>> shifted = A.shift(0.5)
        >>> type(shifted).__name__, shifted.apply(torch.ones(2))
        ('ShiftedOperator', tensor([3.5000, 3.5000]))
    """

    def __init__(
        self, operator: TensorOperator, shift_value: float, *, space: ParameterSpace | None = None
    ) -> None:
        self.operator = operator
        self.shift_value = shift_value
        definite = operator.positive_semidefinite and shift_value >= 0
        super().__init__(
            operator.input_size,
            operator.dtype,
            operator.device,
            symmetric=operator.symmetric,
            positive_semidefinite=True if definite else None,
            space=space or operator.space,
        )

    def _weighted(self) -> Sequence[tuple[float, TensorOperator]]:
        identity = IdentityOperator(self.input_size, self.dtype, self.device)
        return [(1.0, self.operator), (self.shift_value, identity)]

    def _exact_eigenvalues(self) -> Tensor | None:
        inner = self.operator._exact_eigenvalues()
        return None if inner is None else inner + self.shift_value

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return torch.add(self.operator._product(rows), rows, alpha=self.shift_value)

    def _apply_rows_adjoint(self, rows: Tensor) -> Tensor:
        return torch.add(self.operator._adjoint_product(rows), rows, alpha=self.shift_value)

    def _identity_factor(self) -> float | None:
        inner = self.operator._identity_factor()
        return None if inner is None else inner + self.shift_value

    def _without_shift(self) -> tuple[TensorOperator, float]:
        inner, shift = self.operator._without_shift()
        return inner, shift + self.shift_value

    def _closed_form_inverse(self, shift: float) -> TensorOperator | None:
        return self.operator._closed_form_inverse(self.shift_value + shift)

    def _exact_logdet(self, scale: float, shift: float) -> float | None:
        return self.operator._exact_logdet(scale, scale * self.shift_value + shift)

    def _mapped(self, function: PartMap) -> TensorOperator:
        operator = function(self.operator)
        return ShiftedOperator(operator, self.shift_value, space=self._space_on(operator.device))

    def _children(self) -> Sequence[TensorOperator]:
        return (self.operator,)

    def _label(self) -> str:
        return f"ShiftedOperator({self.shift_value:+g} I)"


class ComposedOperator(CompositeOperator):
    """The composition AB, first B and then A, which ``A @ B`` returns.

    Args:
        left: A.
        right: B.

    Example:
        >>> import torch
        >>> from hessops import MatrixOperator
        >>> A = MatrixOperator(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        >>> square = A @ A
        >>> type(square).__name__, square.apply(torch.ones(2))
        ('ComposedOperator', tensor([9., 9.]))
    """

    def __init__(self, left: TensorOperator, right: TensorOperator) -> None:
        self.left = left
        self.right = right
        # A product of symmetric operators is symmetric only if they commute; A @ A does.
        squared = left is right and bool(left.symmetric)
        super().__init__(
            left.input_size,
            left.dtype,
            left.device,
            symmetric=True if squared else None,
            positive_semidefinite=True if squared else None,
            space=_common_space((left, right)),
        )

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return self.left._product(self.right._product(rows))

    def _apply_rows_adjoint(self, rows: Tensor) -> Tensor:
        return self.right._adjoint_product(self.left._adjoint_product(rows))

    def _closed_form_inverse(self, shift: float) -> TensorOperator | None:
        if shift != 0:
            return None
        left, right = (part._closed_form_inverse(0.0) for part in (self.left, self.right))
        return None if left is None or right is None else right @ left

    def _exact_logdet(self, scale: float, shift: float) -> float | None:
        if shift != 0 or scale <= 0:
            return None
        try:
            left, right = (part._exact_logdet(1.0, 0.0) for part in (self.left, self.right))
        except StructureError:
            # The product of two indefinite operators may well be definite, as A @ A is.
            return None
        if left is None or right is None:
            return None
        return self.input_size * log(scale) + left + right

    def _mapped(self, function: PartMap) -> TensorOperator:
        left = function(self.left)
        return ComposedOperator(left, left if self.right is self.left else function(self.right))

    def _children(self) -> Sequence[TensorOperator]:
        return (self.left, self.right)


class TransposedOperator(CompositeOperator):
    """The transpose Aᵀ, which ``A.T`` returns where A is not symmetric and has an adjoint hook.

    Args:
        operator: A.

    Example:
        >>> import torch
        >>> from hessops import MatrixOperator
        >>> A = MatrixOperator(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        >>> type(A.T).__name__, A.T.apply(torch.ones(2))
        ('TransposedOperator', tensor([1., 5.]))
    """

    def __init__(self, operator: TensorOperator) -> None:
        self.operator = operator
        super().__init__(
            operator.input_size,
            operator.dtype,
            operator.device,
            symmetric=operator.symmetric,
            positive_semidefinite=operator.positive_semidefinite,
            space=operator.space,
        )

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return self.operator._adjoint_product(rows)

    def _apply_rows_adjoint(self, rows: Tensor) -> Tensor:
        return self.operator._product(rows)

    def _exact_diagonal(self) -> Tensor | None:
        return self.operator._exact_diagonal()

    def _exact_trace(self) -> float | None:
        return self.operator._exact_trace()

    def _exact_squared_norm(self) -> float | None:
        return self.operator._exact_squared_norm()

    def _closed_form_inverse(self, shift: float) -> TensorOperator | None:
        inverse = self.operator._closed_form_inverse(shift)
        return None if inverse is None else inverse.T

    def _exact_logdet(self, scale: float, shift: float) -> float | None:
        return self.operator._exact_logdet(scale, shift)

    def _mapped(self, function: PartMap) -> TensorOperator:
        return TransposedOperator(function(self.operator))

    def _children(self) -> Sequence[TensorOperator]:
        return (self.operator,)


class _Combinations:
    """The algebra that `TensorOperator` reaches through its protocol; simplifies what it can."""

    def added(self, left: TensorOperator, right: TensorOperator) -> TensorOperator:
        require_compatible(left, right, "+")
        for operator, other in ((left, right), (right, left)):
            factor = other._identity_factor()
            if factor is not None:
                return self.shifted(operator, factor, other.space)
        terms = [
            term
            for operator in (left, right)
            for term in (operator.terms if isinstance(operator, SumOperator) else (operator,))
        ]
        return SumOperator(terms)

    def scaled(
        self, operator: TensorOperator, factor: float, space: ParameterSpace | None = None
    ) -> TensorOperator:
        space = operator.space or space
        if isinstance(operator, ScaledOperator):
            return self.scaled(operator.operator, factor * operator.factor, space)
        if factor == 1 and operator.space == space:
            return operator
        return ScaledOperator(operator, factor, space=space)

    def composed(self, left: TensorOperator, right: TensorOperator) -> TensorOperator:
        require_compatible(left, right, "@")
        for operator, other in ((left, right), (right, left)):
            factor = other._identity_factor()
            if factor is not None:
                return self.scaled(operator, factor, other.space)
        return ComposedOperator(left, right)

    def shifted(
        self, operator: TensorOperator, shift: float, space: ParameterSpace | None = None
    ) -> TensorOperator:
        space = operator.space or space
        if isinstance(operator, ShiftedOperator):
            return self.shifted(operator.operator, operator.shift_value + shift, space)
        if shift == 0 and operator.space == space:
            return operator
        return ShiftedOperator(operator, shift, space=space)

    def transposed(self, operator: TensorOperator) -> TensorOperator:
        if isinstance(operator, TransposedOperator):
            return operator.operator
        # Refused here and not at the first product, where it would be a surprise.
        _require_adjoint(operator)
        return TransposedOperator(operator)

    def inverted(self, operator: TensorOperator, closed_form: TensorOperator) -> TensorOperator:
        if isinstance(operator, InverseOperator):
            return closed_form
        # A shift of the operator is no regularization of the inverse, which can be replaced.
        if isinstance(closed_form, InverseOperator) and not closed_form.regularization:
            return closed_form
        return ClosedFormInverse(operator, closed_form)


TensorOperator._algebra = _Combinations()


def _summed(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _require_adjoint(operator: TensorOperator) -> None:
    """Raises `StructureError` where an operator, or a part that its adjoint needs, has none."""
    if operator.symmetric:
        return
    if type(operator)._apply_rows_adjoint is TensorOperator._apply_rows_adjoint:
        raise no_adjoint(operator)
    if isinstance(operator, CompositeOperator):
        for child in operator._children():
            _require_adjoint(child)


def _scaled_definiteness(definite: bool | None, factor: float) -> bool | None:
    if factor == 0:
        return True
    return definite if factor > 0 else None


def require_compatible(left: TensorOperator, right: TensorOperator, symbol: str) -> None:
    """Raises where two operators do not act on the same vectors.

    Raises:
        ShapeError, DtypeError, DeviceError: As their names say.
    """
    names = f"{type(left).__name__} {symbol} {type(right).__name__}"
    if left.input_size != right.input_size:
        raise ShapeError(f"{names}: sizes {left.input_size} and {right.input_size} differ")
    if left.dtype != right.dtype:
        raise DtypeError(f"{names}: dtypes {left.dtype} and {right.dtype} differ")
    if left.device != right.device:
        raise DeviceError(
            f"{names}: devices {left.device} and {right.device} differ; move one with .to(device)"
        )
    if left.space is not None and right.space is not None and left.space != right.space:
        raise ShapeError(
            f"{names}: the operators act on different parameters, {left.space!r} and "
            f"{right.space!r}"
        )


def _common_space(operators: Sequence[TensorOperator]) -> ParameterSpace | None:
    return next((op.space for op in operators if op.space is not None), None)


__all__ = [
    "ComposedOperator",
    "ScaledOperator",
    "ShiftedOperator",
    "SumOperator",
    "TransposedOperator",
]
