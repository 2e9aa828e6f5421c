"""Results of a dask calculator on disk: what they are, and the tasks that write their chunks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hessops.influence.converter import NumpyArray
from hessops.influence.dask_graphs import (
    Client,
    DaskArray,
    Key,
    graph_of,
    imported,
    lazy_array,
    optimized,
    row_key,
)
from hessops.influence.dask_points import ChunkedPoints
from hessops.influence.dask_tasks import digest_of_chunk, written
from hessops.influence.description import Description, digest_of_description
from hessops.influence.modes import InfluenceMode
from hessops.influence.storage import ChunkStore
from hessops.progress import progress_bar
from hessops.validation import checked_count


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a result of a calculator comes from.

    Attributes:
        factors: The test points, or their factors where those were given.
        train: The training points; ``None`` for factors.
        mode: What of them varies; ``None`` for factors.
    """

    factors: ChunkedPoints | DaskArray
    train: ChunkedPoints | None = None
    mode: InfluenceMode | None = None

    @property
    def digests(self) -> list[DaskArray]:
        """Hashes of the chunks, of the test points and of the training points."""
        sources = [self.factors] if self.train is None else [self.factors, self.train]
        return [_digests_of(source) for source in sources]

    def description(self, digests: Sequence[NumpyArray]) -> dict[str, Description]:
        """What is computed for which points, given `digests`."""
        rows = _description_of(self.factors, digests[0])
        if self.train is None or self.mode is None:
            return {"kind": "factors", "chunked by": "dask", "points": rows}
        return {
            "kind": "influences",
            "chunked by": "dask",
            "mode": str(self.mode),
            "test": rows,
            "train": _description_of(self.train, digests[1]),
        }


def _arrays_of(source: ChunkedPoints | DaskArray) -> list[DaskArray]:
    return [source.x, source.y] if isinstance(source, ChunkedPoints) else [source]


def _digests_of(source: ChunkedPoints | DaskArray) -> DaskArray:
    arrays = _arrays_of(source)
    name = "-".join(["digests", *(array.name for array in arrays)])
    sizes = arrays[0].chunks[0]
    tasks: dict[Key, object] = {
        (name, i): (digest_of_chunk, *(row_key(array, i) for array in arrays))
        for i in range(len(sizes))
    }
    return lazy_array(name, tasks, arrays, ((1,) * len(sizes),), np.dtype("<U64"))


def _description_of(source: ChunkedPoints | DaskArray, digests: NumpyArray) -> Description:
    """The sizes of the chunks and a hash of their content in order."""
    return {
        "order": digest_of_description([str(digest) for digest in digests]),
        "chunks": [int(size) for size in _arrays_of(source)[0].chunks[0]],
    }


def on_a_grid(array: DaskArray, row_chunk: int | None, column_chunk: int | None) -> DaskArray:
    """The same numbers in chunks of one size, but for smaller last ones, as zarr has them.

    Args:
        array: ``(m, n, ...)``, ragged along the first two dimensions.
        row_chunk: Rows of a chunk; ``None`` takes the largest there is.
        column_chunk: Columns, likewise.
    """
    wanted = {0: _size(array, 0, row_chunk, "row_chunk")}
    wanted[1] = _size(array, 1, column_chunk, "column_chunk")
    # Not peer to peer, which starts all over when a worker dies.
    return array.rechunk(wanted, method="tasks")


def _size(array: DaskArray, dimension: int, wanted: int | None, name: str) -> int:
    if wanted is None:
        return int(max(array.chunks[dimension]))
    return min(checked_count(wanted, name), int(array.shape[dimension]))


def write_missing(
    array: DaskArray, store: ChunkStore, client: Client, *, progress: bool = False
) -> None:
    """Computes and writes the chunks that a store does not hold.

    Where a chunk fails, or the caller is interrupted, the others are cancelled; those that are
    written stay.

    Args:
        array: In the chunks of the store.
        store: Where workers can write to it.
        client: Of the workers.
        progress: Shows a progress bar.
    """
    missing = [(row, column) for row, some in store.missing().items() for column in sorted(some)]
    total = store.grid[0] * store.grid[1]
    (array,) = optimized([array])
    pending = set(client.compute(_writes(array, store, missing)))
    completed = imported("distributed").as_completed(list(pending))
    with progress_bar("chunks", "chunk", total, show=progress, keep=True) as bar:
        bar.advance(total - len(missing))
        try:
            for future in completed:
                future.result()
                # What is written is done with: a worker that dies later takes nothing of it along.
                pending.discard(future)
                future.release()
                bar.advance()
        except BaseException:
            client.cancel(list(pending))
            raise


def _writes(array: DaskArray, store: ChunkStore, places: Iterable[tuple[int, int]]) -> list[Any]:
    """A task for each place that writes a chunk there."""
    name = f"write-{array.name}"
    trailing = [0] * (array.ndim - 2)
    tasks: dict[Key, object] = {
        (name, *place): (written, store, place, (array.name, *place, *trailing)) for place in places
    }
    graph, delayed = graph_of(name, tasks, [array]), imported("dask.delayed").Delayed
    return [delayed(key, graph, layer=name) for key in tasks]
