"""What fitting an influence model finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hessops.influence.gradients import GradientProvider
from hessops.operators.base import TensorOperator
from hessops.operators.diagonal import BlockDiagonalOperator
from hessops.space import ParameterSpace


@dataclass(frozen=True)
class FittedBlock:
    """What was fitted for one block of parameters.

    Attributes:
        space: Its parameters.
        operator: The curvature A of the block; ``None`` after `load` where it is not needed.
        kept: A, or what is kept of it and inverted.
        mean_eigenvalue: tr(A)/P, where a relative damping needed it.
        regularization: λ.
        inverse: The operator close to (A + λI)⁻¹.
    """

    space: ParameterSpace
    operator: TensorOperator | None
    kept: TensorOperator
    mean_eigenvalue: float | None
    regularization: float
    inverse: TensorOperator

    def to(self, device: torch.device | str) -> FittedBlock:
        """The same block on another device."""
        return replace(
            self,
            space=self.space.to(device),
            operator=None if self.operator is None else self.operator.to(device),
            kept=self.kept.to(device),
            inverse=self.inverse.to(device),
        )


@dataclass(frozen=True)
class FittedModel:
    """What `InfluenceFunctionModel.fit` found.

    Attributes:
        provider: The gradients of points at the parameters of the fit.
        blocks: What was fitted, by block.
        num_points: Number of training points.
        data_fingerprint: A hash of them that does not depend on their order.
        data_order: A hash of the batches in their order; ``None`` without batches.
        randomness: A hash of the state of the generator that the fit drew from.
    """

    provider: GradientProvider
    blocks: Mapping[str, FittedBlock]
    num_points: int | None
    data_fingerprint: str | None
    data_order: str | None
    randomness: str

    @property
    def space(self) -> ParameterSpace:
        """The covered parameters."""
        return self.provider.space

    def positions(self) -> dict[str, Tensor]:
        """Where the parameters of each block are in the flat vector."""
        return {name: self.space.indices(b.space.names) for name, b in self.blocks.items()}

    def joint_inverse(self) -> TensorOperator:
        """The inverses of the blocks as one operator on the flat vector."""
        inverses = [block.inverse for block in self.blocks.values()]
        if len(inverses) == 1:
            return inverses[0]
        return BlockDiagonalOperator._at(inverses, list(self.positions().values()), self.space)

    def to(self, device: torch.device | str) -> FittedModel:
        """The same on another device."""
        return replace(
            self,
            provider=self.provider.to(device),
            blocks={name: block.to(device) for name, block in self.blocks.items()},
        )
