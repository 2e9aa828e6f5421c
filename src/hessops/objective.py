"""Objective: a model and a loss as pure functions of parameters and a batch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from hessops.copies import Copyable
from hessops.errors import HessopsError, ModelError
from hessops.isolation import without_remarks
from hessops.point_loss import Loss, PointLoss, Reduction
from hessops.printed import Node, Printed
from hessops.snapshot import ModelSnapshot
from hessops.space import ParameterSpace, RestrictTo
from hessops.streaming import Batch
from hessops.verification import Verification


class Objective(Copyable, Printed):
    r"""The mean loss :math:`L(\theta) = \frac1n \sum_i \ell_i(\theta)` of a model over points.

    :math:`\ell_i` is the loss on point i alone. The objective works on a copy of the model, taken
    when it is made: its parameters, buffers, device and train/eval flags stay what they were then
    (see `refresh`), and the user's model is never written to, moved or switched.

    Args:
        model: Called with the inputs of a batch as its one argument; returns a tensor ``(n, ...)``
            or a tuple or mapping of such tensors.
        loss: ``loss(output, target)``; a module or function.
        restrict_to: The parameters to differentiate by, ``{name: parameter}`` or names; ``None``
            takes all trainable ones.
        reduction: What `loss` returns: the scalar ``"mean"`` over points, their scalar ``"sum"``,
            or a vector ``(n,)`` of per-sample losses (``"none"``).

    Raises:
        ArgumentError: An unknown `reduction`.
        ModelError: No trainable parameter; a model that rewrites its weights
            (``Embedding(max_norm=...)``), has sparse gradients, is compiled, or cannot be copied.
        ParameterNameError: `restrict_to` names an unknown or frozen parameter.
        DtypeError: Parameters of mixed or complex dtype.
        DeviceError: Parameters on several devices.
        NonFiniteError: NaN or infinity in a parameter or buffer.

    Example:
        >>> import torch
        >>> from hessops import Batch, Objective
        >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss())
        >>> batch = Batch.from_raw((torch.zeros(4, 3), torch.zeros(4, 2)))
        >>> objective.check(batch)
        >>> objective.sample_losses(objective.params, batch).shape
        torch.Size([4])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        restrict_to: RestrictTo | None = None,
        *,
        reduction: Reduction = "mean",
    ) -> None:
        self._point_loss = PointLoss(loss, reduction)
        self._hold(ModelSnapshot(model, loss, restrict_to))

    def _hold(self, snapshot: ModelSnapshot) -> None:
        self._snapshot = snapshot
        self._point_loss = replace(self._point_loss, function=snapshot.loss)

    @property
    def space(self) -> ParameterSpace:
        """The parameters to differentiate by."""
        return self._snapshot.space

    @property
    def reduction(self) -> Reduction:
        """What the loss returns: ``"mean"``, ``"sum"`` or ``"none"``."""
        return self._point_loss.reduction

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters of the copy, ``{name: tensor}``, without gradients."""
        return dict(self._snapshot.params)

    def hash_of_values(self) -> int:
        """A 64-bit hash of all parameters, frozen ones too, buffers, and what the loss holds."""
        return self._snapshot.hash_of_values()

    @property
    def device(self) -> torch.device:
        """Where the copy of the model lives."""
        return self.space.device

    @property
    def model(self) -> nn.Module:
        """The model's own copy, for its structure; use `params` for values."""
        return self._snapshot.module

    @property
    def loss(self) -> Loss:
        """The loss, its own copy where it is a module."""
        return self._point_loss.function

    def is_of(self, model: nn.Module, loss: Loss, reduction: Reduction) -> bool:
        """Whether it was made of this very model and loss, read in this way."""
        snapshot = self._snapshot
        is_theirs = snapshot.users_model is model and snapshot.users_loss is loss
        return is_theirs and reduction == self.reduction

    def refresh(self) -> Self:
        """Takes a new copy of the user's model as it is now, in place; returns itself."""
        self._hold(self._snapshot.refreshed())
        return self

    def restricted(self, names: Iterable[str]) -> Objective:
        """The same objective, differentiated by some of its parameters only; values are shared.

        Raises:
            ParameterNameError: A name that is not in `space`, or none.
        """
        fewer = copy.copy(self)
        fewer._hold(self._snapshot.restricted(names))
        return fewer

    def at(self, params: Mapping[str, Tensor]) -> Objective:
        """The same objective with other values of the parameters of `space`; it cannot be moved."""
        other = copy.copy(self)
        other._hold(self._snapshot.at(params))
        return other

    def to(self, device: torch.device | str) -> Objective:
        """The same objective, values included, on another device."""
        moved = copy.copy(self)
        moved._hold(self._snapshot.to(device))
        return moved

    def in_precision(self, dtype: torch.dtype) -> Objective:
        """The same objective with its values rounded to a lower dtype; it cannot be refreshed.

        Batches are to come in that dtype, too.

        Raises:
            NonFiniteError: A parameter or buffer is beyond the range of `dtype`.
        """
        lower = copy.copy(self)
        lower._hold(self._snapshot.in_precision(dtype))
        return lower

    def kernels(self, *, any_order: bool = False) -> AbstractContextManager[None]:
        """A context in which every kernel of the model can be differentiated twice.

        Args:
            any_order: Derivatives of third order and forward mode are right too, at some cost.
        """
        return self._snapshot.kernels(any_order=any_order)

    @contextmanager
    def differentiating(self, what: str, *, any_order: bool = False) -> Iterator[None]:
        """The state for a product: the right kernels, torch's own remarks silenced.

        Args:
            what: The matrix whose product is computed, for the message.
            any_order: As in `kernels`.

        Raises:
            ModelError: Torch cannot compute the product.
        """
        with self.kernels(any_order=any_order), without_remarks():
            try:
                yield
            except (torch.OutOfMemoryError, HessopsError):
                raise
            except (RuntimeError, NotImplementedError) as error:
                raise ModelError(
                    f"torch cannot compute a product of {what} for this model and "
                    f"loss: {error}. {_remedy(error)}"
                ) from error

    def output(self, params: Mapping[str, Tensor], x: object) -> object:
        """The model's output at `params`, which may name some of the parameters only."""
        return self._snapshot.output(params, x)

    def output_loss(self, output: object, batch: Batch) -> Tensor:
        """The mean loss of a given output over the points of the batch, shape ``()``."""
        return self._point_loss.mean_loss(output, batch)

    def batch_loss(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The mean loss over the points of the batch, shape ``()``."""
        return self.output_loss(self.output(params, batch.x), batch)

    def sample_losses(self, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The loss of every point on its own, shape ``(n,)``."""
        return self._point_loss.sample_losses(self.output(params, batch.x), batch)

    def check(self, batch: Batch) -> None:
        """Verifies on one batch that the mean over points is what the model and loss compute.

        One forward must leave the global random state unchanged (no active dropout), the forward of
        a random half of the batch must equal those rows (no batch-norm in training mode), and the
        batch's loss must be the mean, sum or vector of the loss over the rows of the output, in its
        value and in its gradient by the output: where all outputs are zero, as those of a new last
        layer may be, every weighted mean has the same value. Costs about half a gradient. The
        random state is restored. Values on the meta device are not looked at.

        Raises:
            DataError: A batch of no points.
            NonFiniteError: NaN or infinity in the inputs, targets, output, loss or its gradient.
            DtypeError: Floating-point inputs or targets of another dtype than the parameters that
                the model or loss does not take.
            TrainingModeError: A random forward, or one that couples points.
            ModelError: The output has no leading dimension over points, does not depend on the
                parameters, or reaches them by ways that cannot be replaced; weights or inputs are
                rewritten.
            LossError: The loss is not what `reduction` claims, or not a function of output and
                target alone.
        """
        Verification(self._snapshot, self._point_loss, batch).run()

    def _node(self) -> Node:
        model = type(self.model).__name__
        shown = f"{model}, {self._point_loss.name}, reduction={self.reduction!r}"
        return Node(f"Objective({shown})", parts=[self.space], of=self)


def _remedy(error: Exception) -> str:
    """What to change where torch cannot compute a product."""
    if "expected device" in str(error) or "on the same device" in str(error):
        return (
            "A tensor that model, loss or batch operation hold outside parameters and buffers "
            "stays where it is: move it to the device of the batch before it is used"
        )
    return (
        "A layer or loss without a second derivative, or an operation in place, must be replaced "
        "(checkpoints need use_reentrant=False)"
    )
