"""Identity, diagonal and block-diagonal operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Self, TypeVar

import torch
from torch import Tensor

from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DeviceError,
    DtypeError,
    ParameterNameError,
    ShapeError,
    SingularOperatorError,
)
from hessops.operators.base import CompositeOperator, TensorOperator
from hessops.operators.determinant import rounding_of_sum, sum_of_logarithms
from hessops.space import ParameterSpace
from hessops.validation import checked_floating

_RowMap = Callable[[Tensor], Tensor]
_Value = TypeVar("_Value")


class IdentityOperator(TensorOperator):
    """The identity on R^n; ``c * IdentityOperator(n)`` is c·I.

    Args:
        input_size: n.
        dtype: Dtype of the vectors; ``None`` is torch's default.
        device: Device of the vectors.
        space: The parameters that the entries stand for, if they do.

    Example:
        >>> import torch
        >>> from hessops import IdentityOperator
        >>> (3 * IdentityOperator(2)).inverse().apply(torch.tensor([3.0, 6.0]))
        tensor([1., 2.])
    """

    def __init__(
        self,
        input_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        *,
        space: ParameterSpace | None = None,
    ) -> None:
        super().__init__(
            input_size,
            dtype or torch.get_default_dtype(),
            device,
            symmetric=True,
            positive_semidefinite=True,
            space=space,
        )

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return rows.clone()

    def _identity_factor(self) -> float:
        return 1.0

    def _exact_eigenvalues(self) -> Tensor:
        return torch.ones(self.input_size, dtype=torch.float64, device=self.device)

    def _exact_diagonal(self) -> Tensor:
        return self._exact_eigenvalues()

    def _closed_form_inverse(self, shift: float) -> TensorOperator:
        if 1 + shift == 0:
            raise SingularOperatorError(f"I + ({shift:g}) I is singular")
        return self / (1 + shift)

    def _exact_logdet(self, scale: float, shift: float) -> float:
        value = torch.full((1,), scale + shift, dtype=torch.float64, device="cpu")
        return self.input_size * sum_of_logarithms(value, 0.0, type(self).__name__)

    def _move(self, device: torch.device) -> Self:
        return self._copy_on(device)


class DiagonalOperator(TensorOperator):
    r"""The matrix :math:`\mathrm{diag}(d)`.

    Args:
        diagonal: d, shape ``(n,)``, real floating point. It is copied.
        space: The parameters that the entries stand for, if they do.

    Raises:
        ArgumentTypeError: `diagonal` is not a tensor.
        ShapeError: It is not one-dimensional, or does not fit `space`.
        DtypeError: It is not real floating point.
        NonFiniteError: It holds NaN or infinity.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator
        >>> A = DiagonalOperator(torch.tensor([1.0, 3.0]))
        >>> A.shift(1.0).inverse().apply(torch.ones(2))
        tensor([0.5000, 0.2500])
    """

    def __init__(self, diagonal: Tensor, *, space: ParameterSpace | None = None) -> None:
        checked_floating(diagonal, "diagonal", ndim=1)
        if space is not None:
            require_space(space, diagonal, "diagonal")
        self.diagonal = diagonal.detach().clone()
        super().__init__(
            len(diagonal),
            diagonal.dtype,
            diagonal.device,
            symmetric=True,
            positive_semidefinite=None if diagonal.is_meta else bool((diagonal >= 0).all()),
            space=space,
        )

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return rows * self.diagonal

    def _exact_eigenvalues(self) -> Tensor:
        return self._exact_diagonal()

    def _exact_diagonal(self) -> Tensor:
        return self.diagonal.double()

    def _closed_form_inverse(self, shift: float) -> TensorOperator:
        shifted = self.diagonal + shift
        threshold = torch.finfo(self.dtype).tiny
        if not shifted.is_meta and bool((shifted.abs() < threshold).any()):
            position = int(shifted.abs().argmin())
            raise SingularOperatorError(
                f"the diagonal entry {position} is {shifted[position].item():g}; the operator is "
                "singular: shift it"
            )
        return DiagonalOperator(1 / shifted, space=self.space)

    def _exact_logdet(self, scale: float, shift: float) -> float | None:
        if self.diagonal.is_meta:
            return None
        scaled = scale * self.diagonal.double()
        rounding = rounding_of_sum(scaled, shift, torch.float64)
        return sum_of_logarithms(scaled + shift, rounding, type(self).__name__)

    def _move(self, device: torch.device) -> Self:
        moved = self._copy_on(device)
        moved.diagonal = self.diagonal.to(device)
        return moved


class BlockDiagonalOperator(CompositeOperator):
    r"""Operators along the diagonal, zero elsewhere.

    Without `space` the blocks follow one another in the flat vector. With it, each block acts on
    parameters that it names itself (its own `space`), wherever they lie in the flat order, so that
    the order of the blocks does not matter.

    Args:
        blocks: Operators of one dtype and device.
        space: The parameters of the whole. Every one must belong to exactly one block.

    Raises:
        ArgumentError: There are no blocks.
        ArgumentTypeError: A block is not a `TensorOperator`.
        DtypeError, DeviceError: Blocks that differ.
        ParameterNameError: With `space`: a block without named parameters, an unknown parameter,
            one in two blocks, or one in none.

    Example:
        >>> import torch
        >>> from hessops import BlockDiagonalOperator, DiagonalOperator, MatrixOperator
        >>> A = BlockDiagonalOperator(
        ...     [
        ...         MatrixOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]])),
        ...         DiagonalOperator(torch.ones(1)),
        ...     ]
        ... )
        >>> A.apply(torch.ones(3))
        tensor([3., 3., 1.])
    """

    def __init__(
        self, blocks: Sequence[TensorOperator], *, space: ParameterSpace | None = None
    ) -> None:
        self.blocks = tuple(blocks)
        first = _checked_blocks(self.blocks)
        self._positions = (
            _consecutive(self.blocks) if space is None else _by_name(self.blocks, space)
        )
        super().__init__(
            sum(block.input_size for block in self.blocks),
            first.dtype,
            first.device,
            symmetric=all_known([block.symmetric for block in self.blocks]),
            positive_semidefinite=all_known([b.positive_semidefinite for b in self.blocks]),
            space=space,
        )

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return self._blockwise(rows, [block._product for block in self.blocks])

    def _apply_rows_adjoint(self, rows: Tensor) -> Tensor:
        return self._blockwise(rows, [block._adjoint_product for block in self.blocks])

    def _blockwise(self, rows: Tensor, maps: Sequence[_RowMap]) -> Tensor:
        result = torch.zeros_like(rows)
        for positions, apply in zip(self._positions, maps, strict=True):
            result[:, positions] = apply(rows[:, positions])
        return result

    def _closed_form_inverse(self, shift: float) -> TensorOperator | None:
        inverses = [block._closed_form_inverse(shift) for block in self.blocks]
        known = [inverse for inverse in inverses if inverse is not None]
        if len(known) < len(inverses):
            return None
        return BlockDiagonalOperator._at(known, self._positions, self.space)

    def _exact_logdet(self, scale: float, shift: float) -> float | None:
        total = 0.0
        for block in self.blocks:
            value = block._exact_logdet(scale, shift)
            if value is None:
                return None
            total += value
        return total

    def _exact_eigenvalues(self) -> Tensor | None:
        known = every_known([block._exact_eigenvalues() for block in self.blocks])
        return None if known is None else torch.cat(known)

    def _exact_diagonal(self) -> Tensor | None:
        known = every_known([block._exact_diagonal() for block in self.blocks])
        if known is None:
            return None
        diagonal = torch.empty(self.input_size, dtype=torch.float64, device=self.device)
        for positions, part in zip(self._positions, known, strict=True):
            diagonal[positions] = part
        return diagonal

    def _exact_trace(self) -> float | None:
        known = every_known([block._exact_trace() for block in self.blocks])
        return None if known is None else sum(known)

    def _exact_squared_norm(self) -> float | None:
        known = every_known([block._exact_squared_norm() for block in self.blocks])
        return None if known is None else sum(known)

    @classmethod
    def _at(
        cls,
        blocks: Sequence[TensorOperator],
        positions: Sequence[Tensor],
        space: ParameterSpace | None,
    ) -> BlockDiagonalOperator:
        """Blocks at positions that cover the flat vector, which are not checked."""
        placed = BlockDiagonalOperator(blocks)
        placed._positions = tuple(where.to(placed.device) for where in positions)
        placed._space = None if space is None else space.to(placed.device)
        return placed

    def _mapped(
        self, function: Callable[[TensorOperator], TensorOperator]
    ) -> BlockDiagonalOperator:
        blocks = [function(block) for block in self.blocks]
        return BlockDiagonalOperator._at(blocks, self._positions, self.space)

    def _children(self) -> Sequence[TensorOperator]:
        return self.blocks


class DiagonalBlock(CompositeOperator):
    """The rows and columns of an operator at some positions; a product is one with all of it.

    Args:
        operator: A.
        positions: Positions in the flat vector, ``(p,)`` int64, in the order of the block.
        space: The parameters that the entries of a vector of the block stand for, if they do.

    Example:
        >>> import torch
        >>> from hessops import MatrixOperator
        >>> from hessops.operators.diagonal import DiagonalBlock
        >>> A = MatrixOperator(torch.arange(9.0).reshape(3, 3))
        >>> DiagonalBlock(A, torch.tensor([0, 2])).to_dense()
        tensor([[0., 2.],
                [6., 8.]])
    """

    def __init__(
        self, operator: TensorOperator, positions: Tensor, space: ParameterSpace | None = None
    ) -> None:
        super().__init__(
            len(positions),
            operator.dtype,
            operator.device,
            symmetric=operator.symmetric,
            positive_semidefinite=True if operator.positive_semidefinite else None,
            space=space,
        )
        self.operator, self.positions = operator, positions

    def _apply_rows(self, rows: Tensor) -> Tensor:
        return self._within(rows, self.operator._product)

    def _apply_rows_adjoint(self, rows: Tensor) -> Tensor:
        return self._within(rows, self.operator._adjoint_product)

    def _exact_diagonal(self) -> Tensor | None:
        known = self.operator._exact_diagonal()
        return None if known is None else known[self.positions]

    def _within(self, rows: Tensor, apply: _RowMap) -> Tensor:
        whole = rows.new_zeros(len(rows), self.operator.input_size)
        whole[:, self.positions] = rows
        return apply(whole)[:, self.positions]

    def _mapped(self, function: Callable[[TensorOperator], TensorOperator]) -> DiagonalBlock:
        operator = function(self.operator)
        space = self._space_on(operator.device)
        return DiagonalBlock(operator, self.positions.to(operator.device), space)

    def _children(self) -> Sequence[TensorOperator]:
        return (self.operator,)


def all_known(flags: Sequence[bool | None]) -> bool | None:
    """``True`` if all are, ``False`` if one is false, ``None`` where that is unknown."""
    if any(flag is False for flag in flags):
        return False
    return True if all(flags) else None


def every_known(values: Sequence[_Value | None]) -> list[_Value] | None:
    """All values, or ``None`` where one is unknown."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def require_space(space: ParameterSpace, tensor: Tensor, name: str) -> None:
    """Raises where a tensor with n rows cannot stand for the parameters of a space.

    Raises:
        ShapeError, DtypeError, DeviceError: As their names say.
    """
    if space.size != len(tensor):
        raise ShapeError(f"{name} has {len(tensor)} rows, space has size {space.size}")
    if space.dtype != tensor.dtype:
        raise DtypeError(f"{name} is {tensor.dtype}, space {space.dtype}")
    if space.device != tensor.device:
        raise DeviceError(f"{name} is on {tensor.device}, space on {space.device}")


def _checked_blocks(blocks: Sequence[TensorOperator]) -> TensorOperator:
    if not blocks:
        raise ArgumentError("blocks is empty: give at least one operator")
    for number, block in enumerate(blocks):
        if not isinstance(block, TensorOperator):
            raise ArgumentTypeError(
                f"blocks[{number}] must be a TensorOperator, got {type(block).__name__}"
            )
        if block.dtype != blocks[0].dtype:
            raise DtypeError(f"blocks[{number}] is {block.dtype}, blocks[0] {blocks[0].dtype}")
        if block.device != blocks[0].device:
            raise DeviceError(
                f"blocks[{number}] is on {block.device}, blocks[0] on {blocks[0].device}"
            )
    return blocks[0]


def _consecutive(blocks: Sequence[TensorOperator]) -> tuple[Tensor, ...]:
    ends = list(accumulate(block.input_size for block in blocks))
    starts = [0, *ends[:-1]]
    device = blocks[0].device
    return tuple(torch.arange(a, b, device=device) for a, b in zip(starts, ends, strict=True))


def _by_name(blocks: Sequence[TensorOperator], space: ParameterSpace) -> tuple[Tensor, ...]:
    names: dict[str, tuple[str, ...]] = {}
    for number, block in enumerate(blocks):
        if block.space is None:
            raise ParameterNameError(
                f"blocks[{number}] ({type(block).__name__}) has no parameter space, so that its "
                "place within space is unknown"
            )
        names[f"blocks[{number}]"] = block.space.names
    pieces = space.partition(names)
    for (label, piece), block in zip(pieces.items(), blocks, strict=True):
        if block.space is not None and piece.shapes != block.space.shapes:
            raise ShapeError(f"{label} has other shapes or another order than space")
        if list(piece.names) != list(block.space.names if block.space else ()):
            raise ShapeError(f"{label} orders its parameters differently from space")
    return tuple(space.indices(piece.names) for piece in pieces.values())
