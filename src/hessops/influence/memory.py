"""How much memory the stages of a run need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessops.functional.columns import columns_that_fit
from hessops.functional.gradients import GRADIENT_BYTES
from hessops.functional.memory import RetainedBytes
from hessops.functional.products import differentiable
from hessops.influence.gradients import require_floating
from hessops.influence.model import InfluenceFunctionModel
from hessops.influence.modes import InfluenceMode
from hessops.influence.ordered import OrderedBatches
from hessops.isolation import isolated
from hessops.objective import Objective
from hessops.printed import Node, Printed
from hessops.streaming import Batch

# Vectors as long as the right-hand sides that a solver keeps (solution, residual, direction,
# product, and what their updates need for a moment).
SOLVER_VECTORS = 8


@dataclass(frozen=True, repr=False)
class MemoryEstimate(Printed):
    """Peak memory of each stage in bytes, beside the model itself.

    They are a model of what is held, from one batch of each collection, good to a factor of two or
    three; stages follow each other, so that the largest decides.

    Attributes:
        fit: What `fit` made and the model keeps.
        gradients: The gradients of one batch of test points.
        factors: Solving for them.
        scores: The influences of one batch of training points on one of test points.
        result: All influences, where `compute` gathers them.

    Example:
        >>> from hessops.influence import MemoryEstimate
        >>> estimate = MemoryEstimate(fit=0, gradients=2**20, factors=2**22, scores=10, result=100)
        >>> estimate.peak == 2**22, str(estimate).splitlines()[2]
        (True, 'factors      4.0 MiB')
    """

    fit: int
    gradients: int
    factors: int
    scores: int
    result: int

    @property
    def peak(self) -> int:
        """What `fit` keeps and the largest of the stages after it, without the result."""
        return self.fit + max(self.gradients, self.factors, self.scores)

    def __str__(self) -> str:
        return "\n".join(f"{name:<10}{size:>6.1f} MiB" for name, size in self._sizes().items())

    def _sizes(self) -> dict[str, float]:
        """The stages in MiB."""
        stages = ("fit", "gradients", "factors", "scores", "result")
        return {name: getattr(self, name) / 2**20 for name in stages}

    def _node(self) -> Node:
        return Node(
            f"MemoryEstimate(peak {self.peak / 2**20:.1f} MiB)",
            parts=[Node(f"{name} {size:.1f} MiB") for name, size in self._sizes().items()],
        )


def estimated_memory(
    model: InfluenceFunctionModel,
    test: OrderedBatches,
    train: OrderedBatches,
    mode: InfluenceMode,
) -> MemoryEstimate:
    """The estimate of a run over two collections."""
    space, objective = model.space, model.gradient_provider.objective
    first_test, first_train = test.first(), train.first()
    itemsize = space.dtype.itemsize
    with isolated(space.device):
        of_test, of_train = _retained(objective, first_test), _retained(objective, first_train)
    factors = first_test.size * space.size * itemsize
    columns = min(first_test.size, columns_that_fit(space, of_train))
    # A stacked product holds a few vectors and the gradients of the activations for each column.
    product = columns * (4 * space.size * itemsize + of_train) if model.needs_data else 0
    perturbs = mode is InfluenceMode.PERTURBATION
    scored = require_floating(first_train.x)[0].numel() if perturbs else 1
    # A graph that is differentiated again retains about three times what a forward does.
    scores = factors + 3 * of_train + columns * of_train
    scores += first_test.size * first_train.size * scored * itemsize
    num_points = test.survey().num_points * train.survey().num_points
    return MemoryEstimate(
        fit=_held_by(model),
        gradients=2 * factors + min(GRADIENT_BYTES, factors) + of_test,
        factors=SOLVER_VECTORS * factors + 3 * of_train + product,
        scores=scores,
        result=num_points * scored * itemsize,
    )


def _retained(objective: Objective, batch: Batch) -> int:
    """Bytes that the graph of a batch's loss retains."""
    retained = RetainedBytes()
    with (
        objective.differentiating("the loss"),
        torch.enable_grad(),
        retained.counting(),
    ):
        objective.batch_loss(differentiable(objective.params), batch)
    return retained.total


def _held_by(model: InfluenceFunctionModel) -> int:
    """Bytes of the matrices and eigenpairs that a fitted model keeps."""
    seen: dict[int, int] = {}
    for block in model.fitted.blocks.values():
        for operator in (block.kept, block.inverse):
            for tensor in _tensors_in(operator):
                seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def _tensors_in(value: object, depth: int = 4) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if depth == 0 or not hasattr(value, "__dict__"):
        return []
    of_ours = type(value).__module__.startswith("hessops.")
    names = [n for n in vars(value) if n not in ("batch_operation", "stream")] if of_ours else []
    return [t for name in names for t in _tensors_in(getattr(value, name), depth - 1)]
