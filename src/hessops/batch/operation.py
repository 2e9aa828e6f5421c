"""BatchOperation: the product of one batch's matrix with vectors."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Self

import torch
from torch import Tensor

from hessops.copies import Copyable
from hessops.errors import ArgumentError, ArgumentTypeError, DeviceError, ShapeError
from hessops.functional.products import Stack
from hessops.isolation import isolated
from hessops.printed import Node, Printed
from hessops.space import ParameterSpace
from hessops.streaming import Batch
from hessops.validation import checked_rows

# Adds to the second tensor a multiple of the products with the rows of the first.
AddRows = Callable[[Tensor, Tensor, float], None]


class BatchOperation(Copyable, Printed, ABC):
    r"""The linear map :math:`v \mapsto m(b)\, v` of one batch b: the mean over *its* points.

    A subclass hands its parameter space to this constructor and defines `_apply_stack`. `apply`
    and `apply_to_dict`, with validation, device moves and both 1-D and 2-D input, follow from it.
    Joined with data and an averaging by `BatchOperator`, it is an operator.

    Args:
        space: The parameter space it acts on; it states size, dtype and device.
        symmetric: Whether every m(b) is symmetric; ``None`` for unknown.
        positive_semidefinite: Whether every m(b) is; ``None`` for unknown.

    Example:
        >>> import torch
        >>> from hessops import Batch, BatchOperation, ParameterSpace
        >>> class SecondMoment(BatchOperation):
        ...     def _apply_stack(self, batch, tensors):
        ...         along = tensors["weight"] @ batch.x.T
        ...         return {"weight": along @ batch.x / batch.size}
        >>> operation = SecondMoment(ParameterSpace.from_tensors({"weight": torch.zeros(2)}))
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> operation.apply((x, None), torch.ones(2))
        tensor([5., 0.])
    """

    def __init__(
        self,
        space: ParameterSpace,
        *,
        symmetric: bool | None = None,
        positive_semidefinite: bool | None = None,
    ) -> None:
        if not isinstance(space, ParameterSpace):
            raise ArgumentTypeError(f"space must be a ParameterSpace, got {type(space).__name__}")
        self.space = space
        self.symmetric = symmetric
        self.positive_semidefinite = positive_semidefinite

    @abstractmethod
    def _apply_stack(self, batch: Batch, tensors: Stack) -> Stack:
        """The hook: products with k vectors.

        Args:
            batch: The points, on the device of the space.
            tensors: ``{name: (k, *shape)}``, k >= 1.

        Returns:
            The same structure.
        """

    def check(self, batch: Batch) -> None:  # optional: most operations have no claim
        """Verifies what can be verified on a batch; called for every batch of a first pass."""

    def apply(self, batch: Batch | tuple[object, object], tensor: Tensor) -> Tensor:
        """m(b)·v for a vector ``(P,)``, or for every row of a ``(k, P)`` stack.

        Args:
            batch: A `Batch` or a pair ``(x, y)``.
            tensor: Of the dtype of the space; moved to its device.

        Returns:
            A tensor of the shape of `tensor`.

        Raises:
            ShapeError, DtypeError, NonFiniteError: `tensor` does not fit.
            DataError: `batch` is not a batch.
        """
        space = self.space
        with isolated(space.device):
            rows = checked_rows(tensor, space.size, space.dtype, space.device)
            moved = Batch.from_raw(batch).to(space.device)
            self.check(moved)
            result = self.apply_rows(moved, rows)
        return result if tensor.ndim == 2 else result[0]

    def apply_to_dict(
        self, batch: Batch | tuple[object, object], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """m(b)·v for a dictionary ``{name: shape}``, or stacked ``{name: (k, *shape)}``."""
        return self.space.unflatten(self.apply(batch, self.space.flatten(tensors)))

    def apply_rows(self, batch: Batch, rows: Tensor) -> Tensor:
        """Products with the rows ``(k, P)`` of a validated stack on the right device."""
        if len(rows) == 0 or batch.size == 0:
            return torch.zeros_like(rows)
        version = rows._version
        products = self.space.flatten(self._apply_stack(batch, self.space.unflatten(rows)))
        self._require_unwritten(rows, version)
        self._require_shape(products, rows.shape)
        return products

    def add_rows(self, batch: Batch, rows: Tensor, total: Tensor, weight: float) -> None:
        """Adds a multiple of the products of `apply_rows` to a tensor of their shape."""
        total.add_(self.apply_rows(batch, rows), alpha=weight)

    def _require_shape(self, products: Tensor, shape: torch.Size) -> None:
        if products.shape != shape:
            raise ShapeError(
                f"{type(self).__name__} maps vectors of shape {tuple(shape)} to "
                f"{tuple(products.shape)}: its hook does not keep the contract"
            )

    def _require_unwritten(self, rows: Tensor, version: int) -> None:
        if rows._version != version:
            raise ArgumentError(
                f"the hook of {type(self).__name__} writes to its argument; return new tensors"
            )

    def graph_bytes(self, batch: Batch) -> int | None:
        """What `linearized` would retain, estimated; ``None`` where it saves no work."""
        return None

    def linearized(self, batch: Batch) -> AddRows:
        """As `add_rows` for one batch, with what that alone determines.

        For batches of at least one point, of which `graph_bytes` is not ``None``; others are
        traversed anew in each product.
        """
        return partial(self.add_rows, batch)

    def to(self, device: torch.device | str) -> Self:
        """The same operation on another device."""
        if torch.device(device) == self.space.device:
            return self
        moved = copy.copy(self)
        moved.space = self.space.to(device)
        moved._move_parts(torch.device(device))
        return moved

    def _move_parts(self, device: torch.device) -> None:
        """Moves what a subclass holds beside the space; called on a shallow copy."""
        held = [name for name, value in vars(self).items() if isinstance(value, Tensor)]
        if held:
            raise DeviceError(
                f"{type(self).__name__} holds tensors {held}; define _move_parts(device) to move "
                "them"
            )

    def refresh(self) -> Self:
        """Takes the values of what it was built from anew, in place; returns itself."""
        return self

    def _node(self) -> Node:
        return Node(f"{type(self).__name__}()", parts=[self.space])
