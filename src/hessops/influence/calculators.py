"""Calculators: influences of collections that are larger than memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
from torch import Tensor

from hessops.copies import Copyable
from hessops.errors import ArgumentTypeError, ShapeError
from hessops.influence.converter import tensor_of_array
from hessops.influence.gradients import checked_factors
from hessops.influence.lazy import FactorSource, GivenFactors, LazyFactors, LazyInfluences
from hessops.influence.memory import MemoryEstimate, estimated_memory
from hessops.influence.model import InfluenceFunctionModel
from hessops.influence.modes import InfluenceMode, checked_mode
from hessops.influence.ordered import OrderedBatches
from hessops.influence.storage import ZarrArray
from hessops.printed import Node, Printed, settings_of
from hessops.space import ParameterSpace


class SequentialInfluenceCalculator(Copyable, Printed):
    """Influences of collections, one batch of test points after the other.

    The factors of a batch of test points are computed once; then one pass over the training points
    scores them. Nothing grows with the number of training points but what is asked for in the end.

    Both collections come from loaders whose order is the same in every pass: one that shuffles is
    refused, since positions in it mean nothing, and any other change of order is noticed.

    Args:
        model: A fitted influence model.
        progress: Shows a progress bar with an estimate of the time that remains.
        cache: What of the batches may be kept on the device between passes; see `BatchStream`. By
            default nothing, so that memory does not grow with the collections.

    Raises:
        ArgumentTypeError: `model` is something else.
        NotFittedError: `model` is not fitted.

    Example:
        >>> import torch
        >>> from hessops.influence import CgInfluence, SequentialInfluenceCalculator
        >>> model = torch.nn.Linear(2, 1)
        >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
        >>> train = [(x[:4], y[:4]), (x[4:], y[4:])]
        >>> influence = CgInfluence(model, torch.nn.MSELoss(), 0.1).fit(train)
        >>> lazy = SequentialInfluenceCalculator(influence).influences([(x[:3], y[:3])], train)
        >>> [(chunk.test, chunk.train) for chunk in lazy]
        [(slice(0, 3, None), slice(0, 4, None)), (slice(0, 3, None), slice(4, 8, None))]
        >>> lazy.compute().shape, lazy.top_k(2).indices.shape
        (torch.Size([3, 8]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        model: InfluenceFunctionModel,
        *,
        progress: bool = False,
        cache: str | bool | int = False,
    ) -> None:
        if not isinstance(model, InfluenceFunctionModel):
            raise ArgumentTypeError(
                f"model must be an InfluenceFunctionModel, got {type(model).__name__}"
            )
        # A copy, so that it stays the fit that was given when the model is fitted again.
        self.model = copy.copy(model)
        self.progress = progress
        self.cache = cache
        self._provider = model.fitted.provider

    def _node(self) -> Node:
        return Node(settings_of(self, "progress", "cache"), parts=[self.model])

    def influence_factors(self, loader: Iterable[object]) -> LazyFactors:
        """The factors of a collection, ``(m, P)``, when they are asked for.

        Args:
            loader: The points: a ``DataLoader`` or list of batches in a fixed order.

        Raises:
            DataError: The loader shuffles.
        """
        return LazyFactors(self.model, self._ordered(loader, "loader"), progress=self.progress)

    def influences_from_factors(
        self,
        factors: LazyFactors | Tensor | Mapping[str, Tensor] | ZarrArray,
        loader: Iterable[object],
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> LazyInfluences:
        """The influences of training points, from the factors of test points.

        Args:
            factors: From `influence_factors`; or ``(m, P)``, as a tensor, or as the zarr array that
                `LazyFactors.to_zarr` wrote.
            loader: The training points, in a fixed order.
            mode: An `InfluenceMode` or its name.

        Raises:
            DataError: The loader shuffles.
            ArgumentError: An unknown `mode`.
            ShapeError, DtypeError, NonFiniteError: `factors` do not fit.
        """
        return LazyInfluences(
            self.model,
            self._source(factors),
            self._ordered(loader, "loader"),
            checked_mode(mode, InfluenceMode, "mode"),
            progress=self.progress,
        )

    def influences(
        self,
        test_loader: Iterable[object],
        train_loader: Iterable[object],
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> LazyInfluences:
        """The influences of a collection of training points on one of test points.

        Args:
            test_loader: m points, in a fixed order.
            train_loader: n points, in a fixed order.
            mode: An `InfluenceMode` or its name.

        Raises:
            DataError: A loader shuffles.
            ArgumentError: An unknown `mode`.
        """
        mode = checked_mode(mode, InfluenceMode, "mode")
        factors = LazyFactors(self.model, self._ordered(test_loader, "test_loader"))
        train = self._ordered(train_loader, "train_loader")
        return LazyInfluences(self.model, factors, train, mode, progress=self.progress)

    def estimate_memory(
        self,
        test_loader: Iterable[object],
        train_loader: Iterable[object],
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> MemoryEstimate:
        """What each stage of `influences` needs at its peak, from the first batch of each loader.

        Args:
            test_loader: As of `influences`.
            train_loader: As of `influences`.
            mode: An `InfluenceMode` or its name.

        Raises:
            DataError: A loader shuffles.
            ArgumentTypeError, DtypeError: The inputs are not one floating-point tensor, for
                PERTURBATION.
        """
        return estimated_memory(
            self.model,
            self._ordered(test_loader, "test_loader"),
            self._ordered(train_loader, "train_loader"),
            checked_mode(mode, InfluenceMode, "mode"),
        )

    def _ordered(self, loader: Iterable[object], name: str) -> OrderedBatches:
        return OrderedBatches(
            loader, self._provider, name, unpack=self.model.unpack, cache=self.cache
        )

    def _source(self, factors: object) -> FactorSource:
        space = self.model.space
        if isinstance(factors, FactorSource):
            return factors
        if isinstance(factors, (Tensor, Mapping)):
            return GivenFactors(checked_factors(factors, space, "factors"), _as_it_is)
        shape = getattr(factors, "shape", None)
        if shape is None:
            raise ArgumentTypeError(
                "factors must be a tensor, a zarr array or what influence_factors returns, got "
                f"{type(factors).__name__}"
            )
        if len(shape) != 2 or shape[1] != space.size:
            raise ShapeError(f"factors has shape {tuple(shape)}, expected (m, {space.size})")

        return GivenFactors(factors, partial(_read, space))  # type: ignore[arg-type]  # any array will do


def _tensor_of(rows: object) -> Tensor:
    if isinstance(rows, np.ma.MaskedArray):
        raise ArgumentTypeError("factors must have no mask: fill it")
    return tensor_of_array(np.asarray(rows), "factors")


def _read(space: ParameterSpace, rows: object) -> Tensor:
    return checked_factors(_tensor_of(rows), space, "factors")


def _as_it_is(rows: object) -> Tensor:
    assert isinstance(rows, Tensor)
    return rows
