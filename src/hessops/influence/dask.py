"""DaskInfluenceCalculator: influences of collections on the workers of a cluster."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from hessops.copies import Copyable
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    CopyError,
    DataError,
    DtypeError,
    ShapeError,
)
from hessops.influence.converter import ArrayConverter, TorchNumpyConverter
from hessops.influence.dask_dataset import torch_dataset_to_dask_array
from hessops.influence.dask_graphs import (
    Client,
    DaskArray,
    Future,
    Key,
    imported,
    lazy_array,
    optimized,
    row_key,
)
from hessops.influence.dask_points import ChunkedPoints, checked_by_rows
from hessops.influence.dask_store import Origin, on_a_grid, write_missing
from hessops.influence.dask_tasks import (
    Shipment,
    check_of_chunk,
    delivered,
    factors_of_chunk,
    facts_of_worker,
    require_one_thread_each,
    resolved,
    scores_of_chunk,
)
from hessops.influence.description import Description, describe
from hessops.influence.model import InfluenceFunctionModel
from hessops.influence.modes import InfluenceMode, checked_mode
from hessops.influence.storage import ChunkStore, ZarrArray, manifest_of
from hessops.printed import Node, Printed, described
from hessops.solvers import LissaOperator

__all__ = ["DaskInfluenceCalculator", "TorchNumpyConverter", "torch_dataset_to_dask_array"]


class DaskInfluenceCalculator(Copyable, Printed):
    r"""Influences of collections as dask arrays, computed by the workers of a cluster.

    With :math:`f_i = (A + \lambda I)^{-1} \nabla\ell_i` the factors of m test points, the
    influences of n training points are

    .. math:: \mathcal I_{ij} = \langle f_i, \nabla_\theta \ell_j\rangle

    and a task computes them for the points of two chunks. The factors of a chunk are computed once
    for all of its row. Nothing is computed until it is asked for, with `client`.

    The model is pickled once, with what its inverse needs: models that solve by products with the
    curvature take their training data along. It is sent to the scheduler, and each worker unpacks
    it once; where workers die, it is sent again and only what they held is computed again.
    Warnings of solves are in the logs of the workers.

    Args:
        model: A fitted influence model, whose parts can be pickled.
        converter: From chunks to tensors and back; has ``from_numpy`` and ``to_numpy`` as
            `TorchNumpyConverter` does.
        client: A client of workers with one thread each. hessops switches state of the whole
            process, so a cluster within this process (``processes=False``) must not compute while
            other threads of it use torch.

    Raises:
        ArgumentTypeError: An argument is something else, or `model` cannot be pickled.
        NotFittedError: `model` is not fitted.
        ArgumentError: A worker has several threads. One that joins later is noticed by its tasks.
        DataError: LiSSA with a generator of its own: its draws would depend on the order of chunks.
        ImportError: dask or distributed is not installed.

    Example:
        >>> import dask.array as da
        >>> import torch
        >>> from distributed import Client
        >>> from hessops.influence import (
        ...     DaskInfluenceCalculator,
        ...     DirectInfluence,
        ...     TorchNumpyConverter,
        ... )
        >>> x, y = torch.randn(6, 2), torch.randn(6, 1)
        >>> model = DirectInfluence(torch.nn.Linear(2, 1), torch.nn.MSELoss(), 0.1).fit([(x, y)])
        >>> points = (
        ...     da.from_array(x.numpy(), chunks=(4, 2)),
        ...     da.from_array(y.numpy(), chunks=(4, 1)),
        ... )
        >>> one_thread = {"processes": False, "n_workers": 1, "threads_per_worker": 1}
        >>> with Client(**one_thread, dashboard_address=":0") as client:
        ...     calculator = DaskInfluenceCalculator(model, TorchNumpyConverter(), client)
        ...     influences = calculator.influences(*points)
        ...     print(influences.chunks, influences.compute().shape)
        ((4, 2), (4, 2)) (6, 6)
    """

    def __init__(
        self, model: InfluenceFunctionModel, converter: ArrayConverter, client: Client
    ) -> None:
        imported("dask.array")
        if not isinstance(model, InfluenceFunctionModel):
            raise ArgumentTypeError(
                f"model must be an InfluenceFunctionModel, got {type(model).__name__}"
            )
        # A copy, so that it stays the fit that was given when the model is fitted again.
        self.model = _without_data(model)
        self.converter = _checked_converter(converter)
        self.client = _checked_client(client)
        _require_independent_chunks(self.model)
        self._seed = torch.initial_seed()
        payload = _pickled(Shipment(self.model, converter, self._seed))
        self._token = hashlib.sha256(payload).hexdigest()[:32]
        self._delivery = _sent(payload, f"influence-model-{self._token}", client)
        self._made: dict[str, Origin] = {}

    def _node(self) -> Node:
        converter = Node(f"converter={described(self.converter)}")
        return Node("DaskInfluenceCalculator()", parts=[converter, self.model])

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refused: a pickled client comes back broken.

        Raises:
            CopyError: That.
        """
        raise CopyError(
            f"the client of a {type(self).__name__} belongs to this process and can be neither "
            "copied nor pickled: copy the model, and make a calculator for it where there is a "
            "client"
        )

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__reduce_ex__(None)

    # --- lazy results --------------------------------------------------------------------

    def influence_factors(self, x: DaskArray, y: DaskArray) -> DaskArray:
        """The factors of a collection, ``(m, P)``.

        Args:
            x: Inputs ``(m, ...)``, chunked along the points only.
            y: Targets ``(m, ...)``, in the same chunks.

        Returns:
            Of the parameters' dtype, in the chunks of `x` along the points.

        Raises:
            ArgumentTypeError, ShapeError, DataError, DtypeError: `x` or `y` is none that can be
                used; the message says what to do. When it is computed, what the model raises.
        """
        return self._factors(ChunkedPoints.of(x, y))

    def influences_from_factors(
        self,
        factors: DaskArray,
        x: DaskArray,
        y: DaskArray,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> DaskArray:
        """The influences of training points, from the factors of test points.

        Args:
            factors: ``(m, P)`` of the parameters' dtype, chunked by rows: from `influence_factors`,
                or from disk.
            x: Inputs of n training points, chunked along the points only.
            y: Their targets, in the same chunks.
            mode: An `InfluenceMode` or its name.

        Returns:
            ``(m, n)`` of the parameters' dtype for UP, ``(m, n, *x.shape[1:])`` of the dtype of `x`
            for PERTURBATION; in the chunks of `factors` by those of `x`.

        Raises:
            ArgumentError: An unknown `mode`.
            ShapeError, DtypeError: `factors` do not fit; `x` is not floating point, for
                PERTURBATION.
            ArgumentTypeError, DataError: As of `influence_factors`.
        """
        mode = checked_mode(mode, InfluenceMode, "mode")
        return self._scores(self._checked_factors(factors), ChunkedPoints.of(x, y), mode)

    def influences(
        self,
        x_test: DaskArray,
        y_test: DaskArray,
        x: DaskArray | None = None,
        y: DaskArray | None = None,
        mode: InfluenceMode | str = InfluenceMode.UP,
    ) -> DaskArray:
        """The influences of n training points on m test points.

        Args:
            x_test: Inputs of m test points, chunked along the points only.
            y_test: Their targets, in the same chunks.
            x: Inputs of n training points; ``None`` takes the test points for both.
            y: Their targets.
            mode: An `InfluenceMode` or its name.

        Returns:
            As of `influences_from_factors`.

        Raises:
            ArgumentError: An unknown `mode`, or one of `x` and `y` without the other.
            HessopsError: As of `influences_from_factors`.
        """
        mode = checked_mode(mode, InfluenceMode, "mode")
        if (x is None) != (y is None):
            given, other = ("y", "x") if x is None else ("x", "y")
            raise ArgumentError(f"{given} is given without {other}: pass both, or neither")
        test = ChunkedPoints.of(x_test, y_test, "x_test", "y_test")
        train = test if x is None else ChunkedPoints.of(x, y)
        return self._scores(self._factors(test), train, mode)

    def _factors(self, points: ChunkedPoints) -> DaskArray:
        name = self._name("influence-factors", points.x, points.y)
        tasks: dict[Key, object] = {
            (name, i, 0): (factors_of_chunk, self._delivery, i, *points.keys(i))
            for i in range(len(points.sizes))
        }
        chunks = (points.sizes, (self.model.space.size,))
        self._made[name] = Origin(points)
        return lazy_array(name, tasks, [points.x, points.y], chunks, self._dtype)

    def _scores(self, factors: DaskArray, train: ChunkedPoints, mode: InfluenceMode) -> DaskArray:
        is_up = mode is InfluenceMode.UP
        if not is_up and train.x.dtype.kind != "f":
            raise DtypeError(f"x is {train.x.dtype}; only a floating-point input can be perturbed")
        name = self._name(f"influences-{mode}", factors, train.x, train.y)
        shape = () if is_up else train.x.shape[1:]
        tasks: dict[Key, object] = {}
        for j in range(len(train.sizes)):
            keys = train.keys(j)
            tasks[f"check-{name}-{j}"] = (check_of_chunk, self._delivery, j, *keys)
            for i in range(len(factors.chunks[0])):
                place: Key = (name, i, j, *[0 for _ in shape])
                what = (row_key(factors, i), *keys, f"check-{name}-{j}")
                tasks[place] = (scores_of_chunk, self._delivery, mode, j, *what)
        chunks = (factors.chunks[0], train.sizes, *((size,) for size in shape))
        of_points = self._made.get(factors.name)
        self._made[name] = Origin(factors if of_points is None else of_points.factors, train, mode)
        dtype = self._dtype if is_up else train.x.dtype.newbyteorder("=")
        return lazy_array(name, tasks, [factors, train.x, train.y], chunks, dtype)

    def _name(self, kind: str, *arrays: DaskArray) -> str:
        """Equal for equal computations, so that they are made once where they meet."""
        token = imported("dask.base").tokenize(self._token, *(array.name for array in arrays))
        return f"{kind}-{token}"

    @property
    def _dtype(self) -> np.dtype[Any]:
        """That of the parameters; `DtypeError` where numpy has none."""
        return self.converter.to_numpy(torch.empty(0, dtype=self.model.space.dtype)).dtype

    def _checked_factors(self, factors: object) -> DaskArray:
        rows, size = checked_by_rows(factors, "factors"), self.model.space.size
        if rows.ndim != 2 or rows.shape[1] != size:
            raise ShapeError(f"factors has shape {rows.shape}, expected (m, {size})")
        if rows.dtype != self._dtype:
            raise DtypeError(
                f"factors is {rows.dtype}, expected {self._dtype}; convert it with "
                f".astype({self._dtype.name!r})"
            )
        return rows

    # --- on disk -------------------------------------------------------------------------

    def to_zarr(
        self,
        array: DaskArray,
        path: str | Path,
        *,
        row_chunk: int | None = None,
        column_chunk: int | None = None,
        progress: bool = False,
    ) -> ZarrArray:
        """Writes factors or influences to a zarr array, or goes on where a run stopped.

        Workers write their own chunks, each of which is a file that is there whole or not at all,
        so that `path` must lead to the same directory everywhere. Beside them is a manifest as of
        `LazyInfluences.to_zarr`, with a hash of the points. A run with the same manifest computes
        what is missing; any other is refused. The points are read once more for their hash; so are
        factors that this calculator did not make. Needs zarr 3.

        Args:
            array: What a method of this calculator returned.
            path: A directory that does not exist yet, is empty, or holds what an earlier run of
                the same computation wrote.
            row_chunk: Rows in a chunk of the store; ``None`` takes those of the largest chunk of
                `array`. The store has chunks of one size, whatever `array` has.
            column_chunk: Columns in a chunk, likewise.
            progress: Shows a progress bar over the chunks.

        Returns:
            The array, opened for reading.

        Raises:
            ArgumentTypeError: `array` is no dask array.
            ArgumentError: It was not made by this calculator.
            StoreError: Something else lies at `path`; the message says what differs.
            DataError: A model whose solves may be rounded differently when they are made again.
            ImportError: zarr is not installed.
            OSError: Of the file system; what was written before is whole.
        """
        origin = self._origin_of(array)
        grid = on_a_grid(array, row_chunk, column_chunk)
        store = ChunkStore.open(
            resolved(path),
            shape=grid.shape,
            chunks=[sizes[0] for sizes in grid.chunks],
            dtype=TorchNumpyConverter().from_numpy(np.empty(0, grid.dtype)).dtype,
            manifest=self._manifest(origin),
        )
        write_missing(grid, store, self.client, progress=progress)
        return store.reader()

    def _origin_of(self, array: object) -> Origin:
        if not isinstance(array, imported("dask.array").Array):
            raise ArgumentTypeError(f"array must be a dask array, got {type(array).__name__}")
        origin = self._made.get(array.name)
        if origin is None:
            raise ArgumentError(
                f"array ({array.name}) was not made by this calculator, so that it is not known "
                "which points it is of: pass what its methods returned as it is, or write with "
                "dask's own array.to_zarr(...), which does not go on where it stopped"
            )
        return origin

    def _manifest(self, origin: Origin) -> dict[str, Description]:
        """Everything that decides the bytes of a result; the machine is that of a worker."""
        lazy = optimized([*origin.digests, self._facts(origin.train)])
        *digests, facts = self.client.compute(lazy, sync=True, optimize_graph=False)
        what = origin.description(digests)
        what["converter"] = describe(self.converter)
        what["seed"] = self._seed if _draws(self.model) else None
        return {**manifest_of(self.model, what), **facts[0]}

    def _facts(self, train: ChunkedPoints | None) -> DaskArray:
        points = [] if train is None else [train.x, train.y]
        keys: list[Key | None] = [row_key(array, 0) for array in points]
        keys = keys or [None, None]
        name = self._name("facts", *points)
        task: dict[Key, object] = {(name, 0): (facts_of_worker, self._delivery, *keys)}
        return lazy_array(name, task, points, ((1,),), np.dtype(object))


def _without_data(model: InfluenceFunctionModel) -> InfluenceFunctionModel:
    """A copy that leaves the training data behind where the inverse does without.

    Raises:
        NotFittedError: `model` is not fitted.
    """
    fitted, lighter = model.fitted, copy.copy(model)
    if not model.needs_data:
        blocks = {name: replace(block, operator=None) for name, block in fitted.blocks.items()}
        lighter._fit = replace(fitted, blocks=blocks)
    return lighter


def _checked_converter(converter: ArrayConverter) -> ArrayConverter:
    if isinstance(converter, type) or not isinstance(converter, ArrayConverter):
        name = converter.__name__ if isinstance(converter, type) else type(converter).__name__
        raise ArgumentTypeError(
            "converter must have the methods from_numpy and to_numpy, as TorchNumpyConverter() "
            f"does, got {'the class ' if isinstance(converter, type) else ''}{name}"
        )
    return converter


def _checked_client(client: Client) -> Client:
    if not isinstance(client, imported("distributed").Client):
        raise ArgumentTypeError(f"client must be a distributed.Client, got {type(client).__name__}")
    if client.asynchronous:
        raise ArgumentTypeError("client must not be asynchronous: use Client(asynchronous=False)")
    require_one_thread_each(client.nthreads())
    return client


def _draws(model: InfluenceFunctionModel) -> bool:
    """Whether each solve draws random numbers."""
    return any(isinstance(inverse, LissaOperator) for inverse in model.inverses.values())


def _require_independent_chunks(model: InfluenceFunctionModel) -> None:
    for inverse in model.inverses.values():
        if isinstance(inverse, LissaOperator) and inverse.generator is not None:
            raise DataError(
                "each solve of LiSSA draws from the generator that was given, so that the factors "
                "of a chunk would depend on which were computed before: leave generator out, and "
                "call torch.manual_seed"
            )


def _pickled(shipment: Shipment) -> bytes:
    cloudpickle = imported("cloudpickle")
    try:
        payload: bytes = cloudpickle.dumps(shipment)
    except Exception as error:  # whatever a part of it says
        raise ArgumentTypeError(
            "model, or converter, cannot be pickled, so that it cannot be sent to workers "
            f"({type(error).__name__}: {error}): define module, loss and data set in a module "
            "that workers can import, without open files, locks or generators"
        ) from error
    return payload


def _sent(payload: bytes, key: str, client: Client) -> Future:
    """The shipment on the workers, unpacked by a task.

    Data that are scattered are lost with the workers that hold them. The scheduler keeps the
    argument of a task and runs it again.
    """
    # It warns of what is sent with a graph over and over; this is sent once.
    without_warning = {"distributed.admin.large-graph-warning-threshold": "1PiB"}
    with imported("dask").config.set(without_warning):
        future: Future = client.submit(delivered, payload, key=key)
    return future
