"""The parts of dask that are used: its modules, once they are needed, and lazy arrays."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

# dask and distributed have types in parts only, and need not be there when types are checked.
DaskArray: TypeAlias = Any
Client: TypeAlias = Any
Future: TypeAlias = Any
# A chunk of an array by its name and place, or another task by its name.
Key: TypeAlias = "str | tuple[str | int, ...]"


def imported(name: str) -> Any:
    """A module of dask, distributed, or what comes with them.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"influences on a cluster need dask and distributed, and {name} is not installed: "
            "pip install 'hessops[influence-dask]'"
        ) from error


def row_key(array: DaskArray, position: int) -> Key:
    """The chunk of some rows of an array that is chunked by rows only."""
    return (array.name, position, *[0] * (array.ndim - 1))


def graph_of(name: str, tasks: Mapping[Key, object], dependencies: Sequence[Any]) -> Any:
    """A graph with some tasks in a layer of a name, and what they read.

    The tasks are spelled out: where dask has only a rule for them, it may merge the computation of
    factors into that of every score.
    """
    graphs = imported("dask.highlevelgraph").HighLevelGraph
    return graphs.from_collections(name, dict(tasks), dependencies=list(dependencies))


def optimized(arrays: Sequence[DaskArray]) -> list[DaskArray]:
    """The same arrays with simpler graphs, by rules that depend on their layers only.

    What a chunk is fused with usually depends on how many tasks read it. Where the scheduler still
    has tasks of an earlier computation of the same names, but with other dependencies, it may stop
    for ever (dask issue 9888).
    """
    dask = imported("dask")
    with dask.config.set({"optimization.fuse.active": False}):
        return list(dask.optimize(*arrays))


def lazy_array(
    name: str,
    tasks: Mapping[Key, object],
    dependencies: Sequence[Any],
    chunks: tuple[tuple[int, ...], ...],
    dtype: np.dtype[Any],
) -> DaskArray:
    """An array of one task for each chunk.

    Args:
        name: Its name, and the first part of its keys.
        tasks: A task for each chunk, and others that they read.
        dependencies: Collections that the tasks read chunks of.
        chunks: Their sizes by dimension.
        dtype: That of the chunks.
    """
    graph = graph_of(name, tasks, dependencies)
    meta = np.empty((0,) * len(chunks), dtype=dtype)
    return imported("dask.array").Array(graph, name, chunks, meta=meta)
