"""What fitting an influence model finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hessops.copies import Copyable
from hessops.errors import ParameterNameError, ShapeError
from hessops.influence.description import Description, digest_of_batch, digest_of_description
from hessops.influence.gradients import GradientProvider, checked_factors
from hessops.influence.modes import InfluenceMode
from hessops.isolation import isolated
from hessops.operators.base import TensorOperator
from hessops.operators.curvature import BatchOperator, batch_operators
from hessops.operators.diagonal import BlockDiagonalOperator
from hessops.printed import Node, Printed, counted, named
from hessops.processes import ONE_PROCESS
from hessops.space import ParameterSpace
from hessops.streaming import Batch


@dataclass(frozen=True, repr=False)
class TrainingData(Printed):
    """What a pass over the training data found; ``None`` for a curvature that has no data.

    Attributes:
        num_points: Number of points.
        fingerprint: A hash of them that depends neither on their order nor on their batches; one
            for each part of the curvature that passes over data, joined by spaces.
        order: A hash of the batches in their order.
    """

    num_points: int | None = None
    fingerprint: str | None = None
    order: str | None = None

    @classmethod
    def under(cls, operator: TensorOperator) -> TrainingData:
        """Looks at every batch under a curvature, which checks it.

        Raises:
            HessopsError: See `Objective.check` and `BatchStream`.
        """
        streams: dict[int, BatchOperator] = {}
        digests: list[Description] = []
        for part in batch_operators(operator):
            if id(part.stream) not in streams:
                streams[id(part.stream)] = part
                digests += _digests_of_batches(part)
            part.check_data()
        if not streams:
            return cls()
        prints = [p.stream.survey(p.processes) for p in streams.values()]
        num_points = int(prints[0].partition(":")[0])
        return cls(num_points, " ".join(prints), digest_of_description(digests))

    def _node(self) -> Node:
        if self.num_points is None:
            return Node("TrainingData(none)")
        order = "" if self.order is None else f", order={self.order[:16]}…"
        points = counted(self.num_points, "point")
        return Node(f"TrainingData({points}, fingerprint={self.fingerprint}{order})")


def _digests_of_batches(part: BatchOperator) -> list[Description]:
    """A hash of each batch; where several processes hold them, one for all of each process."""
    processes, own = part.processes, list[Description]()

    def words() -> list[int]:
        with isolated(part.device):
            own.extend(digest_of_batch(batch) for batch in part.checked_batches(part.stream))
        digest = bytes.fromhex(digest_of_description(list(own)))
        return [int.from_bytes(digest[start : start + 4]) for start in range(0, 32, 4)]

    everywhere = processes.gathered(words, 8)
    return list(own) if processes is ONE_PROCESS else [*map(str, everywhere)]


@dataclass(frozen=True, repr=False)
class FittedBlock(Copyable, Printed):
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

    def _node(self) -> Node:
        inverse = named("inverse", self.inverse)
        mean = "" if self.mean_eigenvalue is None else f", mean_eigenvalue={self.mean_eigenvalue:g}"
        label = f"FittedBlock(regularization={self.regularization:g}{mean})"
        return Node(label, parts=[self.space, inverse])

    def to(self, device: torch.device | str) -> FittedBlock:
        """The same block on another device."""
        return replace(
            self,
            space=self.space.to(device),
            operator=None if self.operator is None else self.operator.to(device),
            kept=self.kept.to(device),
            inverse=self.inverse.to(device),
        )


@dataclass(frozen=True, repr=False)
class FittedModel(Copyable, Printed):
    """What `InfluenceFunctionModel.fit` found.

    Attributes:
        provider: The gradients of points at the parameters of the fit.
        blocks: What was fitted, by block.
        data: The training data.
        randomness: A hash of the state of the generator that the fit drew from.
    """

    provider: GradientProvider
    blocks: Mapping[str, FittedBlock]
    data: TrainingData
    randomness: str

    def _node(self) -> Node:
        return Node("FittedModel()", parts=[self.provider, self.data, *self._blocks()])

    @property
    def summary(self) -> str:
        """What it is of, in a few words."""
        count = self.data.num_points
        points = [] if count is None else [counted(count, "point")]
        parameters = counted(self.space.size, "parameter")
        return ", ".join([*points, parameters, counted(len(self.blocks), "block")])

    def _blocks(self) -> list[Node]:
        """A line for each block."""
        return [
            Node(f"block {name!r}: {block.inverse._label()} of {block.space.size}")
            for name, block in self.blocks.items()
        ]

    @property
    def space(self) -> ParameterSpace:
        """The covered parameters."""
        return self.provider.space

    @cached_property
    def positions(self) -> dict[str, Tensor]:
        """Where the parameters of each block are in the flat vector."""
        return {name: self.space.indices(b.space.names) for name, b in self.blocks.items()}

    @cached_property
    def joint_inverse(self) -> TensorOperator:
        """The inverses of the blocks as one operator on the flat vector."""
        inverses = [block.inverse for block in self.blocks.values()]
        if len(inverses) == 1:
            return inverses[0]
        return BlockDiagonalOperator._at(inverses, list(self.positions.values()), self.space)

    def gradients_by_block(self, x: object, y: object) -> dict[str, Tensor]:
        """The gradients of n points, block name -> ``(n, P_block)``."""
        with self.joint_inverse.processes.together():
            rows = self.provider.rows(self.provider.batch(x, y))
        return {name: rows[:, where] for name, where in self.positions.items()}

    def factors(self, batch: Batch) -> Tensor:
        """The factors of the points of a batch, ``(n, P)``."""
        with self.joint_inverse.processes.together():
            rows = self.provider.rows(batch)
        return self.joint_inverse.apply(rows)

    def scores(self, factors: Tensor, batch: Batch, mode: InfluenceMode) -> Tensor:
        """The influences of the points of a batch, from factors ``(m, P)``."""
        if mode is InfluenceMode.UP:
            return self.provider.products(batch, factors)
        return self.provider.mixed_products(batch, factors)

    def block_scores(self, factors: Tensor, batch: Batch, mode: InfluenceMode) -> dict[str, Tensor]:
        """As `scores`, by block."""
        spaces = {name: block.space for name, block in self.blocks.items()}
        products = (
            self.provider.block_products
            if mode is InfluenceMode.UP
            else self.provider.block_mixed_products
        )
        by_names = products(batch, factors, spaces.values())
        return {name: by_names[space.names] for name, space in spaces.items()}

    def joined(self, factors: Mapping[str, Tensor] | Tensor) -> Tensor:
        """Factors by block as flat ones, ``(m, P)``; flat ones are checked.

        Raises:
            ParameterNameError: They have other blocks.
            ShapeError, DtypeError, NonFiniteError: They do not fit.
        """
        if not isinstance(factors, Mapping):
            return checked_factors(factors, self.space, "factors")
        if set(factors) != set(self.blocks):
            raise ParameterNameError(
                f"factors has the blocks {list(factors)}, the model {list(self.blocks)}"
            )
        parts = {
            name: checked_factors(factors[name], block.space, f"factors[{name!r}]")
            for name, block in self.blocks.items()
        }
        counts = {name: len(part) for name, part in parts.items()}
        if len(set(counts.values())) > 1:
            raise ShapeError(f"factors has blocks of different numbers of points, {counts}")
        flat = next(iter(parts.values())).new_zeros(max(counts.values()), self.space.size)
        for name, where in self.positions.items():
            flat[:, where] = parts[name]
        return flat

    def to(self, device: torch.device | str) -> FittedModel:
        """The same on another device."""
        return replace(
            self,
            provider=self.provider.to(device),
            blocks={name: block.to(device) for name, block in self.blocks.items()},
        )
