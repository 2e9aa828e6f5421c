"""The mean of the inverses of the points' damped gradient outer products."""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor, nn

from hessops.batch.model import ModelBatchOperation
from hessops.functional.gradients import PerSampleGradients
from hessops.functional.precision import accumulation_dtype, scaled_rows
from hessops.functional.products import LinearFunction, Stack
from hessops.point_loss import Loss, Reduction
from hessops.space import RestrictTo
from hessops.streaming import Batch
from hessops.validation import checked_number


class InverseHarmonicMeanBatchOperation(ModelBatchOperation):
    r"""Products with the mean of damped rank-one inverses.

    .. math:: \frac1n \sum_i \left(g_i g_i^\top + \lambda I\right)^{-1} v
              = \frac1n \sum_i \frac1\lambda
                \left(v - \frac{g_i^\top v}{\lambda + \lVert g_i\rVert^2}\, g_i\right)

    (Kwon et al. 2024, DataInf, by the formula of Sherman & Morrison). Symmetric positive definite.
    It is itself an approximate inverse of the damped empirical Gauss-Newton matrix: apply it, do
    not invert it. Rounding errors are of the size eps·‖v‖/λ.

    Args:
        model: A module; see `Objective` for what is required of model and loss.
        loss: ``loss(output, target)``.
        regularization: λ > 0; the formula divides by it.
        restrict_to: The parameters to differentiate by; ``None`` takes all trainable ones.
        reduction: What `loss` returns: ``"mean"``, ``"sum"`` or ``"none"``.
        chunk_size: Points whose gradients are held at once; ``None`` takes what fits 256 MiB.

    Raises:
        ArgumentError: `regularization` is not positive.
        HessopsError: Whatever `Objective` raises.

    Example:
        >>> import torch
        >>> from hessops import InverseHarmonicMeanBatchOperation
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> operation = InverseHarmonicMeanBatchOperation(
        ...     model, torch.nn.MSELoss(), regularization=1.0
        ... )
        >>> x = torch.tensor([[0.0], [1.0]])  # gradients 0 and 2: (1 + 1/5) / 2
        >>> operation.apply((x, torch.zeros(2, 1)), torch.ones(1))
        tensor([0.6000])
    """

    always_positive_semidefinite = True
    symmetric_by_construction = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        regularization: float,
        restrict_to: RestrictTo | None = None,
        *,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
    ) -> None:
        self.regularization = _checked_positive(regularization)
        super().__init__(model, loss, restrict_to, reduction=reduction, chunk_size=chunk_size)
        self._gradients = PerSampleGradients(chunk_size)

    def _linearize(self, batch: Batch, *, forward_mode: bool) -> LinearFunction:
        def apply(stack: Stack) -> Stack:
            rows = self.space.flatten(stack)
            wide = rows.to(accumulation_dtype(rows.dtype))
            correction = torch.zeros_like(wide)
            for gradients in self._gradients.chunks(self.objective, batch):
                units, norms = _normalized(gradients.to(wide.dtype))
                # ‖g‖²/(λ + ‖g‖²), without the square that would overflow
                shares = 1 / (1 + self.regularization / norms / norms)
                correction += (wide @ units.T * shares) @ units
            result = (wide - correction / batch.size) / self.regularization
            return self.space.unflatten(result.to(rows.dtype))

        return apply

    def _reverse_product(self, batch: Batch, tensors: Stack) -> Stack:
        # All vectors share the gradients of a chunk of points; they need no chunks of their own.
        return self._linearize(batch, forward_mode=False)(tensors)

    def check(self, batch: Batch) -> None:
        """The check of `Objective.check`, and the sum of the per-sample gradients."""
        super().check(batch)
        if self.space.device.type == "meta":
            return
        with self._differentiating():
            self._gradients.check(self.objective, batch)

    def squared_gradients(self, batch: Batch) -> float:
        r""":math:`\sum_i \lVert g_i\rVert^2` over the points of a batch."""
        with self._differentiating():
            chunks = self._gradients.chunks(self.objective, batch)
            return sum(rows.double().square().sum().item() for rows in chunks)

    def with_regularization(self, regularization: float) -> Self:
        """The same operation for another λ > 0."""
        changed = copy.copy(self)
        changed.regularization = _checked_positive(regularization)
        return changed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.objective!r}, regularization={self.regularization:g})"


def _checked_positive(regularization: object) -> float:
    return checked_number(regularization, "regularization", minimum=0, exclusive=True)


def _normalized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of unit length and their norms; a zero row stays zero and has the norm zero."""
    scaled, largest = scaled_rows(rows)
    norms = scaled.norm(dim=1, keepdim=True)
    return scaled / torch.where(norms > 0, norms, 1.0), (norms * largest).squeeze(1)
