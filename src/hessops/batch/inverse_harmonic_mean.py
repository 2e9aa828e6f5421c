"""The mean of the inverses of the points' damped gradient outer products."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from hessops.batch.model import ModelBatchOperation
from hessops.errors import NonFiniteProductError
from hessops.functional.gradients import PerSampleGradients
from hessops.functional.layerwise import MatrixLayers, PointGradients
from hessops.functional.precision import accumulation_dtype, safe_norms
from hessops.functional.products import LinearFunction, Stack
from hessops.point_loss import Loss, Reduction
from hessops.printed import Node, settings_of
from hessops.space import ParameterSpace, RestrictTo
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

    By layers that apply a matrix, no gradient of a point is kept: products, norms and weighted sums
    follow from the inputs a of a layer and the gradients b by its output, as in
    :math:`\sum_i c_i g_i = \sum_i c_i b_i a_i^\top`; see `hessops.functional.layerwise`. Of other
    parameters the gradients of some points at a time are made.

    Args:
        model: A module; see `Objective` for what is required of model and loss.
        loss: ``loss(output, target)``.
        regularization: λ > 0; the formula divides by it.
        restrict_to: The parameters to differentiate by; ``None`` takes all trainable ones.
        reduction: What `loss` returns: ``"mean"``, ``"sum"`` or ``"none"``.
        chunk_size: Points whose gradients by all other parameters than those of layers are held at
            once; ``None`` takes what fits 256 MiB.

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
        self._begin()

    def _begin(self) -> None:
        """Forgets what was found out about the model."""
        self._gradients = PerSampleGradients(self.chunk_size)
        self._held_matrices = MatrixLayers(self.objective)
        self._summed: set[tuple[str, ...]] = set()

    @property
    def _matrices(self) -> MatrixLayers:
        """The layers of the objective as it is now: copies of an operation have their own."""
        if self._held_matrices.objective is not self.objective:
            self._begin()
        return self._held_matrices

    def _linearize(self, batch: Batch, *, forward_mode: bool) -> LinearFunction:
        def apply(stack: Stack) -> Stack:
            dtype = accumulation_dtype(self.space.dtype)
            wide = {name: part.to(dtype) for name, part in stack.items()}
            correction = {name: torch.zeros_like(part) for name, part in wide.items()}
            for gradients in self._pieces(batch):
                norms = gradients.norms()
                units = gradients.divided_by(norms)
                # ‖g‖²/(λ + ‖g‖²), without the square that would overflow
                shares = 1 / (1 + self.regularization / norms / norms)
                units.add_weighted_sum(correction, units.products(wide) * shares)
            results = {
                name: torch.sub(part, correction[name], alpha=1 / batch.size)
                for name, part in wide.items()
            }
            return {
                name: part.div_(self.regularization).to(self.space.dtype)
                for name, part in results.items()
            }

        return apply

    def _pieces(self, batch: Batch) -> Iterator[_Gradients]:
        """The gradients of some points at a time; of all at once where layers have all parameters.

        Raises:
            ModelError: The gradients of the points do not add up to that of the batch.
        """
        dtype = accumulation_dtype(self.space.dtype)
        if self.space.device.type == "meta":  # there is nothing to be verified
            found, others = PointGradients({}, {}, {}, batch.size), self.space.names
        else:
            found = PointGradients.of(self._matrices, batch).to(dtype)
            others = self._others()
        if not others:
            yield _Gradients(found, batch)
            return
        fewer = self.objective.restricted(others)
        if others not in self._summed and self.space.device.type != "meta":
            self._check_sum(others, batch)
        start = 0
        for rows in self._gradients.chunks(fewer, batch):
            points = slice(start, start + len(rows))
            start += len(rows)
            yield _Gradients(found.some(points), batch, fewer.space, rows.to(dtype))

    def _others(self) -> tuple[str, ...]:
        """The parameters of which no layer is known to apply them as a matrix."""
        layers = self._matrices.layers.values()
        covered = {name for layer in layers for name in layer.form.space.names}
        return tuple(name for name in self.space.names if name not in covered)

    def _check_sum(self, others: tuple[str, ...], batch: Batch) -> None:
        self._gradients.check(self.objective.restricted(others), batch)
        self._summed.add(others)

    def _columns(self, batch: Batch) -> int:
        # All vectors share the gradients of a chunk of points; they need no chunks of their own.
        return sys.maxsize

    def graph_bytes(self, batch: Batch) -> int | None:
        """``None``: there is no graph to retain."""
        return None

    def check(self, batch: Batch) -> None:
        """The check of `Objective.check`, what layers do, and the sum of all other gradients."""
        super().check(batch)
        if self.space.device.type == "meta":
            return
        with self._differentiating():
            self._matrices.verify(batch)
            others = self._others()
            if others:
                self._check_sum(others, batch)

    def squared_gradients(self, batch: Batch) -> float:
        r""":math:`\sum_i \lVert g_i\rVert^2` over the points of a batch."""
        with self._differentiating():
            norms = [gradients.norms() for gradients in self._pieces(batch)]
        return torch.cat(norms).double().square().sum().item()

    def __copy__(self) -> Self:
        twin = super().__copy__()
        twin._begin()
        return twin

    def _move_parts(self, device: torch.device) -> None:
        super()._move_parts(device)
        self._begin()

    def refresh(self) -> Self:
        """As of `ModelBatchOperation`."""
        super().refresh()
        self._begin()
        return self

    def with_regularization(self, regularization: float) -> Self:
        """The same operation for another λ > 0."""
        changed = copy.copy(self)
        for shared in ("objective", "_gradients", "_held_matrices", "_summed"):
            setattr(changed, shared, getattr(self, shared))
        changed.regularization = _checked_positive(regularization)
        return changed

    def _node(self) -> Node:
        return Node(settings_of(self, "regularization"), parts=[self.objective])


def _checked_positive(regularization: object) -> float:
    return checked_number(regularization, "regularization", minimum=0, exclusive=True)


@dataclass(frozen=True)
class _Gradients:
    """The gradients of some points: as factors by layers, as rows by all other parameters.

    Attributes:
        found: Those by layers.
        batch: The points, and perhaps more.
        space: The other parameters; ``None`` where there are none.
        rows: The gradients by them, ``(n, P_others)``.
    """

    found: PointGradients
    batch: Batch
    space: ParameterSpace | None = None
    rows: Tensor | None = None

    def norms(self) -> Tensor:
        """Their norms ``(n,)``, with no square out of range.

        Raises:
            NonFiniteProductError: NaN or infinity.
        """
        parts = list(self.found.norms().values())
        if self.rows is not None:
            parts.append(safe_norms(self.rows))
        norms = safe_norms(torch.stack(parts, dim=1))
        if not norms.is_meta and not norms.isfinite().all():
            raise NonFiniteProductError(
                f"batch {self.batch.position}: the gradient of a point's loss is NaN or infinite; "
                f"check the scale of parameters and data, or use a wider dtype than {norms.dtype}"
            )
        return norms

    def divided_by(self, norms: Tensor) -> _Gradients:
        """The gradients divided by numbers ``(n,)``; those of number zero, which are zero, stay."""
        factors = torch.where(norms > 0, norms, 1.0).reciprocal()
        rows = None if self.rows is None else self.rows * factors.unsqueeze(1)
        return replace(self, found=self.found.scaled(factors), rows=rows)

    def products(self, stack: Stack) -> Tensor:
        """Inner products with vectors ``{name: (k, *shape)}``, ``(k, n)``."""
        count, like = len(next(iter(stack.values()))), next(iter(stack.values()))
        total = like.new_zeros(count, self.found.size)
        for name, layer in self.found.layers.items():
            total += self.found.products(name, {key: stack[key] for key in layer.form.space.names})
        if self.space is not None and self.rows is not None:
            total += self.space.flatten({key: stack[key] for key in self.space.names}) @ self.rows.T
        return total

    def add_weighted_sum(self, total: Stack, weights: Tensor) -> None:
        """Adds the sums over points with weights ``(k, n)``."""
        for name in self.found.layers:
            for key, part in self.found.weighted_sum(name, weights).items():
                total[key] += part
        if self.space is not None and self.rows is not None:
            for key, part in self.space.unflatten(weights @ self.rows).items():
                total[key] += part
