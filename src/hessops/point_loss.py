"""PointLoss: a loss function and what it claims to return, as losses of points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from hessops.copies import Copyable
from hessops.errors import ArgumentError, ArgumentTypeError, LossError
from hessops.isolation import without_remarks
from hessops.nested import map_tensors, tensor_leaves
from hessops.printed import name_of
from hessops.streaming import Batch

Loss = Callable[..., Tensor]
Reduction = Literal["mean", "sum", "none"]
_Result = TypeVar("_Result")
REDUCTIONS = ("mean", "sum", "none")

ADVICE_ON_LOSS = (
    "Pass an unweighted mean over points (reduction='mean'), their sum (reduction='sum'), or best "
    "the vector of per-sample losses (reduction='none', as in "
    "torch.nn.CrossEntropyLoss(weight=..., reduction='none') with hessops' reduction='none'); "
    "leave ignored targets out of the data"
)


@dataclass(frozen=True)
class PointLoss(Copyable):
    r"""The losses :math:`\ell_i` of points as functions of a model's output.

    Attributes:
        function: ``function(output, target)``.
        reduction: What `function` returns: the scalar ``"mean"`` over points, their scalar
            ``"sum"``, or a vector ``(n,)`` of per-sample losses (``"none"``). A claim, which
            `hessops.verification` puts to the test.

    Raises:
        ArgumentError: An unknown `reduction`.
        ArgumentTypeError: `function` cannot be called.

    Example:
        >>> import torch
        >>> from hessops import Batch
        >>> from hessops.point_loss import PointLoss
        >>> batch = Batch.from_raw((torch.zeros(2, 3), torch.zeros(2, 1)))
        >>> output = torch.tensor([[1.0], [3.0]])
        >>> PointLoss(torch.nn.MSELoss(), "mean").sample_losses(output, batch)
        tensor([1., 9.])
    """

    function: Loss
    reduction: Reduction

    _names_of_parts: ClassVar[Mapping[str, str]] = {"function": "loss"}

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ArgumentError(f"reduction must be one of {REDUCTIONS}, got {self.reduction!r}")
        if not callable(self.function):
            raise ArgumentTypeError(
                f"loss must be callable as loss(output, target), got {type(self.function).__name__}"
            )

    @property
    def name(self) -> str:
        """The name of the function, or of its class."""
        return name_of(self.function)

    @property
    def claim(self) -> str:
        """What the function is said to return, in words."""
        names = {"mean": "mean", "sum": "sum", "none": "vector"}
        return names[self.reduction] + " of the losses of its points"

    def mean_loss(self, output: object, batch: Batch) -> Tensor:
        """The mean loss of an output over the points of the batch, shape ``()``."""
        value = self.function(output, batch.y)
        self.require_shape(value, batch)
        if self.reduction == "mean":
            return value
        return value / batch.size if self.reduction == "sum" else value.mean()

    def sample_losses(self, output: object, batch: Batch) -> Tensor:
        """The loss of every point of the batch on its own, shape ``(n,)``."""
        if self.reduction == "none":
            value = self.function(output, batch.y)
            self.require_shape(value, batch)
            return value
        return self.losses_of_rows(output, batch)

    def losses_of_rows(self, output: object, batch: Batch, *, vectorize: bool = True) -> Tensor:
        """The function applied to each row of the output alone, ``(n,)``.

        Args:
            output: n rows.
            batch: n points.
            vectorize: Tries `torch.func.vmap` before a loop over the rows.
        """
        outputs = replace(batch, x=output)

        def loss_of_row(point: Batch) -> Tensor:
            value = self.function(point.x, point.y)
            return value.reshape(()) if self.reduction == "none" else value

        if vectorize:
            try:
                return map_points(loss_of_row, outputs)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # vmap refuses control flow on values; a loop does not
                pass
        points = [outputs.rows(slice(i, i + 1), 1) for i in range(batch.size)]
        return torch.stack([loss_of_row(point) for point in points])

    def reduce(self, losses: Tensor) -> Tensor:
        """What the function claims to return where its points have these losses ``(n,)``."""
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def require_shape(self, value: object, batch: Batch) -> None:
        """Raises `LossError` unless a returned value has the shape that `reduction` means."""
        if not isinstance(value, Tensor):
            raise LossError(f"loss must return a tensor, got {type(value).__name__}")
        expected = (batch.size,) if self.reduction == "none" else ()
        if tuple(value.shape) != expected:
            raise LossError(
                f"batch {batch.position}: loss returned shape {tuple(value.shape)}, but "
                f"reduction={self.reduction!r} means {expected}. {ADVICE_ON_LOSS}"
            )


def map_points(function: Callable[[Batch], _Result], batch: Batch) -> _Result:
    """`torch.func.vmap` over the points of a batch of a function of a batch of one point."""
    leaves = [t for t in tensor_leaves((batch.x, batch.y)) if t.ndim]

    def on_leaves(*rows: Tensor) -> _Result:
        remaining = iter(rows)

        def row(tensor: Tensor) -> Tensor:
            return next(remaining).unsqueeze(0) if tensor.ndim else tensor

        x, y = map_tensors(row, batch.x), map_tensors(row, batch.y)
        return function(replace(batch, x=x, y=y, size=1))

    # That some operation is a loop is no concern of who called, and where warnings are errors they
    # would change the way that is taken.
    with without_remarks():
        mapped: _Result = vmap(on_leaves)(*leaves)
    return mapped
