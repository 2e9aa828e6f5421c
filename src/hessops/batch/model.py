"""Batch operations of a model and a loss: what Hessian, Gauss-Newton and others share."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor, nn

from hessops.batch.operation import AddRows, BatchOperation
from hessops.errors import ArgumentError, ForwardModeError
from hessops.functional.checks import require_forward_agreement, require_symmetry
from hessops.functional.columns import columns_that_fit, in_column_chunks
from hessops.functional.compiled import CompiledProducts
from hessops.functional.memory import GraphSize, GraphSizes
from hessops.functional.products import LinearFunction, Params, Stack, StackedGradient
from hessops.functional.replayed import ReplayedProducts
from hessops.objective import Objective
from hessops.point_loss import Loss, Reduction
from hessops.printed import Node, settings_of
from hessops.space import RestrictTo
from hessops.streaming import Batch
from hessops.validation import checked_count

Mode = Literal["rev-rev", "rev-fwd"]
MODES = ("rev-rev", "rev-fwd")


class ModelBatchOperation(BatchOperation):
    """A batch operation that differentiates an `Objective`.

    A subclass defines ``_linearize(batch, *, forward_mode)``: one traversal of the model that
    yields a linear map of stacks. `forward_mode` is true only with ``mode="rev-fwd"``, and asks for
    products with a Jacobian by forward mode; a subclass that has none may ignore it. Tensors that a
    subclass holds are not moved with it unless it extends ``_move_parts(device)``.

    Args:
        model: A module; see `Objective` for what is required of model and loss.
        loss: ``loss(output, target)``.
        restrict_to: The parameters to differentiate by; ``None`` takes all trainable ones.
        reduction: What `loss` returns: ``"mean"``, ``"sum"`` or ``"none"``.
        mode: ``"rev-rev"`` differentiates in reverse mode throughout. ``"rev-fwd"`` uses forward
            mode for products with a Jacobian; torch gets some layers wrong there, so it is compared
            with reverse mode on every batch of the first pass.
        chunk_size: Vectors that share one vectorised backward pass; ``None`` decides by a model of
            bytes, see `hessops.functional.columns.columns_that_fit`.
        compile: Compiles products by `torch.compile` where that works, and warns (`CompileWarning`)
            where it does not; what is linearized is not compiled. See
            `hessops.functional.compiled.CompiledProducts`.

    Raises:
        ArgumentError: An unknown `mode`, `chunk_size` below 1, or `compile` in forward mode.
        HessopsError: Whatever `Objective` raises.
    """

    always_positive_semidefinite: bool | None = None
    # Products by double backward are symmetric only if torch's second derivatives are right.
    symmetric_by_construction = False

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        restrict_to: RestrictTo | None = None,
        *,
        reduction: Reduction = "mean",
        mode: Mode = "rev-rev",
        chunk_size: int | None = None,
        compile: bool = False,
    ) -> None:
        if mode not in MODES:
            raise ArgumentError(f"mode must be one of {MODES}, got {mode!r}")
        if compile and mode == "rev-fwd":
            raise ArgumentError("compile=True is for mode='rev-rev' only, got mode='rev-fwd'")
        if chunk_size is not None:
            checked_count(chunk_size, "chunk_size")
        self.objective = Objective(model, loss, restrict_to, reduction=reduction)
        super().__init__(
            self.objective.space,
            symmetric=True,
            positive_semidefinite=self.always_positive_semidefinite,
        )
        self.mode: Mode = mode
        self.chunk_size = chunk_size
        self._stacked_gradient = StackedGradient()
        self._graph_sizes = GraphSizes()
        self._compiled = CompiledProducts(type(self).__name__) if compile else None
        self._symmetry_is_checked = self.symmetric_by_construction

    @abstractmethod
    def _linearize(self, batch: Batch, *, forward_mode: bool) -> LinearFunction:
        """The hook: traverses the model once; returns the map of stacks ``{name: (k, *shape)}``.

        Args:
            batch: The points, on the device of the space.
            forward_mode: Whether products with a Jacobian are to be in forward mode. True only with
                ``mode="rev-fwd"``, whose products are compared with those for ``False``.
        """

    def _apply_stack(self, batch: Batch, tensors: Stack) -> Stack:
        with self._differentiating():
            if self.mode == "rev-fwd":
                return self._forward_product(batch, tensors)
            return self._in_chunks(self._linear_once(batch), batch, tensors)

    def _differentiating(self) -> AbstractContextManager[None]:
        return self.objective.differentiating(type(self).__name__)

    def _reverse_product(self, batch: Batch, tensors: Stack) -> Stack:
        return self._in_chunks(self._reverse_linear(batch), batch, tensors)

    def _in_chunks(self, linear: LinearFunction, batch: Batch, tensors: Stack) -> Stack:
        columns = self._columns_of(batch, len(next(iter(tensors.values()))))
        return in_column_chunks(linear, tensors, columns)

    def _columns_of(self, batch: Batch, count: int) -> int:
        return 1 if count == 1 else self._columns(batch)

    def _linear_once(self, batch: Batch) -> LinearFunction:
        """The map for a single product, compiled where that was asked for."""
        if self._compiled is None or self.space.device.type == "meta":
            return self._reverse_linear(batch)
        return partial(self._compiled, self._flat_product, self.objective.params, batch)

    def _flat_product(self, params: Params, batch: Batch, tensors: Stack) -> Stack:
        """The product as a function of the parameters, to be traced."""
        traced = copy.copy(self)
        traced.objective = self.objective.at(params)
        # What cannot be vectorised in a trace may well be outside.
        traced._stacked_gradient = StackedGradient(vectorize=self._stacked_gradient.vectorize)
        return traced._linearize(batch, forward_mode=False)(tensors)

    def _reverse_linear(self, batch: Batch) -> LinearFunction:
        return self._linearize(batch, forward_mode=False)

    def _columns(self, batch: Batch) -> int:
        """Vectors that share one backward pass."""
        if self.chunk_size is not None:
            return self.chunk_size
        size = self._graph_size(batch)
        return columns_that_fit(self.space, size.num_bytes, size.num_tensors)

    def _graph_size(self, batch: Batch) -> GraphSize:
        def build(points: Batch) -> object:
            # A product too, because some of the graph is made in the first one only.
            linear, space = self._reverse_linear(points), self.space
            zero = torch.zeros(1, space.size, dtype=space.dtype, device=space.device)
            return linear, linear(space.unflatten(zero))

        with self._differentiating():
            return self._graph_sizes.of(batch, build)

    def graph_bytes(self, batch: Batch) -> int | None:
        """As of `BatchOperation`; in forward mode, and on the meta device, nothing is retained."""
        if self.mode == "rev-fwd" or self.space.device.type == "meta":
            return None
        num_bytes = self._graph_size(batch).num_bytes
        return num_bytes + self._record_bytes(num_bytes)

    def linearized(self, batch: Batch) -> AddRows:
        """As of `BatchOperation`, with the graph of the batch at the parameters of now."""
        columns = self._columns(batch)
        with self._differentiating():
            linear = self._reverse_linear(batch)
        if self.space.device.type != "cpu":
            return partial(self._add_linear, linear, columns)
        record_bytes = self._record_bytes(self._graph_size(batch).num_bytes)
        replayed = ReplayedProducts(linear, self.space, record_bytes)
        return partial(self._add_replayed, replayed, columns)

    def _record_bytes(self, graph_bytes: int) -> int:
        """What a record of the products may take beside the graph."""
        if self.space.device.type != "cpu":
            return 0
        # Intermediate results and what is computed from the graph alone, and some vectors.
        return 2 * graph_bytes + 4 * self.space.size * self.space.dtype.itemsize

    def _add_linear(
        self, linear: LinearFunction, columns: int, rows: Tensor, total: Tensor, weight: float
    ) -> None:
        with self._differentiating():
            self._add_columns(linear, columns, rows, total, weight)

    def _add_replayed(
        self, products: ReplayedProducts, columns: int, rows: Tensor, total: Tensor, weight: float
    ) -> None:
        with products.one_at_a_time():
            self._add_linear(products, columns, rows, total, weight)

    def add_rows(self, batch: Batch, rows: Tensor, total: Tensor, weight: float) -> None:
        """As of `BatchOperation`, column by column or some at a time."""
        if self.mode == "rev-fwd" or len(rows) == 0 or batch.size == 0:
            super().add_rows(batch, rows, total, weight)
            return
        columns = self._columns_of(batch, len(rows))
        with self._differentiating():
            self._add_columns(self._linear_once(batch), columns, rows, total, weight)

    def _add_columns(
        self, linear: LinearFunction, columns: int, rows: Tensor, total: Tensor, weight: float
    ) -> None:
        # Each product is added while the processor still has it in its cache.
        version = rows._version
        results = self.space.unflatten(total)
        stack = self.space.unflatten(rows.contiguous())
        for start in range(0, len(rows), columns):
            some = slice(start, start + columns)
            products = linear({name: t[some] for name, t in stack.items()})
            for name, result in results.items():
                part = result[some]
                self._require_shape(products[name], part.shape)
                part.add_(products[name], alpha=weight)
        self._require_unwritten(rows, version)

    def _forward_product(self, batch: Batch, tensors: Stack) -> Stack:
        try:
            return self._linearize(batch, forward_mode=True)(tensors)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise ForwardModeError(
                f"mode='rev-fwd': forward mode fails on this model ({error}); use mode='rev-rev'"
            ) from error

    def check(self, batch: Batch) -> None:
        """The check of `Objective.check`, symmetry once, and forward against reverse mode."""
        self.objective.check(batch)
        if self.space.device.type == "meta":
            return
        if not self._symmetry_is_checked:
            self._check_symmetry(batch)
            self._symmetry_is_checked = True
        if self.mode == "rev-fwd":
            self._check_forward_mode(batch)

    def _check_symmetry(self, batch: Batch) -> None:
        what = f"batch {batch.position}: the products of {type(self).__name__}"
        with self._differentiating():
            require_symmetry(
                partial(self._reverse_product, batch), self.space, what, seed=batch.position
            )

    def _check_forward_mode(self, batch: Batch) -> None:
        with self._differentiating():
            require_forward_agreement(
                partial(self._forward_product, batch),
                partial(self._reverse_product, batch),
                self.space,
                f"batch {batch.position}: mode='rev-fwd'",
                seed=batch.position,
            )

    def restricted(self, names: Iterable[str]) -> Self:
        """The same operation for some of its parameters only: a diagonal block of the matrix.

        The copy of the model is shared.

        Raises:
            ParameterNameError: A name that is not in `space`, or none.
        """
        fewer = copy.copy(self)
        fewer.objective = self.objective.restricted(names)
        fewer.space = fewer.objective.space
        fewer._stacked_gradient, fewer._graph_sizes = StackedGradient(), GraphSizes()
        fewer._forget_compiled()
        return fewer

    def __copy__(self) -> Self:
        """The same operation, which keeps its parameters when this one is refreshed."""
        twin = super().__copy__()
        twin.objective = copy.copy(self.objective)
        return twin

    def _move_parts(self, device: torch.device) -> None:
        self.objective = self.objective.to(device)
        self._stacked_gradient = StackedGradient()
        self._forget_compiled()

    def _forget_compiled(self) -> None:
        """For another model or device: what is no parameter is a constant of what is compiled."""
        if self._compiled is not None:
            self._compiled = self._compiled.anew()

    def refresh(self) -> Self:
        """Takes a new copy of the model as it is now, in place; returns itself."""
        self.objective.refresh()
        self._forget_compiled()
        self._symmetry_is_checked = self.symmetric_by_construction
        return self

    def _node(self) -> Node:
        return Node(settings_of(self, "mode"), parts=[self.objective])
