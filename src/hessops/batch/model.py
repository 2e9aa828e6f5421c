"""Batch operations of a model and a loss: what Hessian, Gauss-Newton and others share."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal, Self

import torch
from torch import nn

from hessops.batch.operation import BatchOperation
from hessops.errors import ArgumentError, ForwardModeError
from hessops.functional.checks import require_forward_agreement, require_symmetry
from hessops.functional.columns import chunked
from hessops.functional.products import LinearFunction, Stack, StackedGradient
from hessops.objective import Objective
from hessops.point_loss import Loss, Reduction
from hessops.space import RestrictTo
from hessops.streaming import Batch
from hessops.validation import checked_count

Mode = Literal["rev-rev", "rev-fwd"]
MODES = ("rev-rev", "rev-fwd")


class ModelBatchOperation(BatchOperation):
    """A batch operation that differentiates an `Objective`.

    A subclass defines `_linearize`: one traversal of the model that yields a linear map of stacks.

    Args:
        model: A module; see `Objective` for what is required of model and loss.
        loss: ``loss(output, target)``.
        restrict_to: The parameters to differentiate by; ``None`` takes all trainable ones.
        reduction: What `loss` returns: ``"mean"``, ``"sum"`` or ``"none"``.
        mode: ``"rev-rev"`` differentiates in reverse mode throughout. ``"rev-fwd"`` uses forward
            mode for products with a Jacobian; torch gets some layers wrong there, so it is compared
            with reverse mode on every batch of the first pass.
        chunk_size: Vectors that share one vectorised backward pass; ``None`` takes as many as fit
            512 MiB by a model of bytes. Never changes what is computed.

    Raises:
        ArgumentError: An unknown `mode`, or `chunk_size` below 1.
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
    ) -> None:
        if mode not in MODES:
            raise ArgumentError(f"mode must be one of {MODES}, got {mode!r}")
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
        self._symmetry_is_checked = self.symmetric_by_construction

    @abstractmethod
    def _linearize(self, batch: Batch, *, forward_mode: bool) -> LinearFunction:
        """Traverses the model once; returns the map of stacks ``{name: (k, *shape)}``."""

    def _apply_stack(self, batch: Batch, tensors: Stack) -> Stack:
        with self._differentiating():
            if self.mode == "rev-fwd":
                return self._forward_product(batch, tensors)
            return self._reverse_product(batch, tensors)

    def _differentiating(self) -> AbstractContextManager[None]:
        return self.objective.differentiating(type(self).__name__)

    def _reverse_product(self, batch: Batch, tensors: Stack) -> Stack:
        linearize = partial(self._linearize, batch, forward_mode=False)
        if len(next(iter(tensors.values()))) == 1:
            return linearize()(tensors)
        return chunked(linearize, self.space, self.chunk_size)(tensors)

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
        fewer._stacked_gradient = StackedGradient()
        return fewer

    def _move_parts(self, device: torch.device) -> None:
        self.objective = self.objective.to(device)
        self._stacked_gradient = StackedGradient()

    def refresh(self) -> Self:
        """Takes a new copy of the model as it is now, in place; returns itself."""
        self.objective.refresh()
        self._symmetry_is_checked = self.symmetric_by_construction
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.objective!r}, mode={self.mode!r})"
