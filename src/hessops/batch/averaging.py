"""How the values of batches are averaged into a value over the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from hessops.copies import Copyable
from hessops.errors import ArgumentError, DataError, ShapeError
from hessops.functional.precision import accumulation_dtype
from hessops.printed import Printed
from hessops.processes import ONE_PROCESS, Processes, Same

NOTHING: Same = {}


class Summand(Protocol):
    """A value that is added where it is wanted, without a tensor of its own."""

    def add_to(self, total: Tensor, weight: float) -> None:
        """Adds weight times the value to a tensor of its shape."""


class Averaging(Copyable, Printed, ABC):
    r"""A weighted mean over batches, :math:`\sum_b w_b v_b / \sum_b w_b`.

    A subclass states the weight of a batch of n points. Sums are kept in float32 where the values
    are of half precision.

    Example:
        >>> import torch
        >>> from hessops import Averaging
        >>> class SquareRootAveraging(Averaging):
        ...     def weight(self, num_points):
        ...         return num_points**0.5
        >>> SquareRootAveraging().reduce([(torch.tensor([3.0]), 1), (torch.tensor([0.0]), 4)])
        tensor([1.])
    """

    # Whether results depend on how the points are split into batches: then every pass over the data
    # must give the same batches, and not just the same points.
    depends_on_batches: bool = True

    @abstractmethod
    def weight(self, num_points: int) -> float:
        """The weight of a batch of `num_points` points; finite and not negative."""

    @property
    def processes(self) -> Processes:
        """Who holds the batches between them: this process alone."""
        return ONE_PROCESS

    @property
    def within_process(self) -> Averaging:
        """The weights, without the processes."""
        return self

    def by_points(self) -> Averaging:
        """The mean over points of the same processes."""
        return PointAveraging()

    def reduce(
        self,
        values: Iterable[tuple[Tensor | Summand, int]],
        like: Tensor | None = None,
        same: Same = NOTHING,
    ) -> Tensor:
        """The weighted mean of pairs (value, number of points).

        Args:
            values: Tensors of one shape, or what is added like them, each with the number of
                points it stands for. They are consumed one at a time.
            like: A tensor of that shape, and of the dtype and device of the result, which averages
                over several processes need: a process may have no values.
            same: What must be equal in all processes, as they check; see `hessops.processes`.

        Returns:
            A new tensor of that shape.

        Raises:
            DataError: There are no values, or their weights sum to zero.
            ArgumentError: A weight is negative or not finite.
            ShapeError: The values differ in shape.
        """
        total: Tensor | None = None
        total_weight, dtype = 0.0, None
        for value, weight in self._weighted(values):
            if total is None:
                first = value if isinstance(value, Tensor) else like
                if first is None:
                    raise ArgumentError("like is needed: the first value is no tensor")
                dtype = first.dtype
                total = torch.zeros_like(first, dtype=accumulation_dtype(dtype))
            _add(total, value, weight)
            total_weight += weight
        if total is None or total_weight == 0:
            raise DataError("there is nothing to average: no batches, or all of weight zero")
        return total.div_(total_weight).to(dtype)

    def add_to(self, total: Tensor, values: Iterable[tuple[Tensor | Summand, int]]) -> float:
        r"""Adds :math:`\sum_b w_b v_b` to a tensor, and returns :math:`\sum_b w_b`."""
        total_weight = 0.0
        for value, weight in self._weighted(values):
            _add(total, value, weight)
            total_weight += weight
        return total_weight

    def _weighted(
        self, values: Iterable[tuple[Tensor | Summand, int]]
    ) -> Iterator[tuple[Tensor | Summand, float]]:
        for value, num_points in values:
            weight = float(self.weight(num_points))
            if not isfinite(weight) or weight < 0:
                raise ArgumentError(
                    f"{type(self).__name__}.weight({num_points}) is {weight}, "
                    "expected a finite number >= 0"
                )
            yield value, weight


def _add(total: Tensor, value: Tensor | Summand, weight: float) -> None:
    if not isinstance(value, Tensor):
        value.add_to(total, weight)
        return
    if value.shape != total.shape:
        raise ShapeError(
            f"values must have one shape, got {tuple(total.shape)} and {tuple(value.shape)}"
        )
    total.add_(value, alpha=weight)


class PointAveraging(Averaging):
    """Every point counts the same: results do not depend on how the data are split into batches.

    Example:
        >>> import torch
        >>> from hessops import PointAveraging
        >>> PointAveraging().reduce([(torch.tensor([4.0]), 1), (torch.tensor([0.0]), 3)])
        tensor([1.])
    """

    depends_on_batches = False

    def weight(self, num_points: int) -> float:
        """n, the number of points."""
        return num_points


class ChunkAveraging(Averaging):
    """Every batch counts the same, a small last one as much as the others (pyDVL's convention).

    Example:
        >>> import torch
        >>> from hessops import ChunkAveraging
        >>> ChunkAveraging().reduce([(torch.tensor([4.0]), 1), (torch.tensor([0.0]), 3)])
        tensor([2.])
    """

    def weight(self, num_points: int) -> float:
        """1."""
        return 1.0
