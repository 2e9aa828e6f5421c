"""ChunkStore: an array on disk, written chunk by chunk by runs that may be interrupted."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hessops.errors import DataError, DtypeError, StoreError
from hessops.files import PARTIAL, digest_of_tensors, write_whole
from hessops.functional.columns import COLUMN_BYTES
from hessops.influence.description import (
    Description,
    difference,
    digest_of_objective,
)
from hessops.influence.kept import tensors_of_kept
from hessops.influence.model import InfluenceFunctionModel
from hessops.operators.base import TensorOperator
from hessops.operators.curvature import batch_operators
from hessops.printed import Node, Printed
from hessops.solvers import LissaOperator
from hessops.streaming import Batch

if TYPE_CHECKING:
    from zarr import Array

    ZarrArray: TypeAlias = Array[Any]
else:
    ZarrArray = object

logger = logging.getLogger(__name__)

MANIFEST = "hessops.json"
CHECKSUM_BYTES = 4
FORMAT = "hessops influences 1"


def manifest_of(
    model: InfluenceFunctionModel, what: Mapping[str, Description], first: Batch | None = None
) -> dict[str, Description]:
    """Everything that decides the bytes of a result.

    Args:
        model: A fitted model.
        what: What is computed, and for which points.
        first: The first batch of training points, whose losses stand for what has no hash.
    """
    import hessops

    _require_repeatable(model)
    fitted = model.fitted
    objective, space = fitted.provider.objective, fitted.space
    losses: Description = None
    if first is not None:
        with objective.differentiating("the points' losses"):
            values = objective.sample_losses(objective.params, first)
        losses = digest_of_tensors({"losses": values})
    return {
        "format": FORMAT,
        **what,
        "parameters": digest_of_objective(objective),
        "configuration": dict(model.configuration()),
        "regularization": {n: b.regularization.hex() for n, b in sorted(fitted.blocks.items())},
        "fit data": [fitted.data.fingerprint, fitted.data.order],
        "kept": {name: _digest_of_kept(b.kept) for name, b in sorted(fitted.blocks.items())},
        "randomness": fitted.randomness,
        "losses": losses,
        "route": {"mode": "reverse", "column bytes": COLUMN_BYTES},
        "device": space.device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "hessops": hessops.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "zarr": _zarr().__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    }


def _digest_of_kept(kept: TensorOperator) -> Description:
    """A hash of what has a file form; other operators follow from parameters and data."""
    tensors = tensors_of_kept(kept)
    return type(kept).__name__ if tensors is None else digest_of_tensors(tensors)


def _require_repeatable(model: InfluenceFunctionModel) -> None:
    """Raises `DataError` where a solve that is made again may be rounded differently."""
    operators = [block.operator for block in model.fitted.blocks.values()]
    if not model.needs_data:
        return
    for inverse in model.inverses.values():
        if isinstance(inverse, LissaOperator) and inverse.generator is not None:
            raise DataError(
                "each solve of LiSSA draws from the generator that was given, so that a run that "
                "is resumed would not give the same bytes: leave generator out, and call "
                "torch.manual_seed"
            )
    for operator in operators:
        for part in () if operator is None else batch_operators(operator):
            if not (part.stream.is_cached or part.stream.has_fixed_order):
                raise DataError(
                    "the model was fitted with a loader whose order may differ from pass to pass, "
                    "so that a run that is resumed would not give the same bytes; fit with "
                    "shuffle=False, or keep the data on the device (cache=True)"
                )


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError(
            "to_zarr needs zarr 3, which is not installed: pip install 'hessops[zarr]'"
        ) from error
    return zarr


class ChunkStore(Printed):
    """A zarr array whose chunks are written once, each whole or not at all.

    Args:
        path: Its directory.
        array: The array there.

    Attributes:
        array: A zarr array without compression, with a checksum for each chunk.
    """

    def __init__(self, path: Path, array: ZarrArray) -> None:
        self._path = path
        self.array = array

    def _node(self) -> Node:
        shape, chunks = (" x ".join(map(str, sizes)) for sizes in (self.array.shape, self.chunks))
        label = f"ChunkStore({self._path.name}, in chunks of {chunks})"
        return Node(label, f"{shape}, {self.array.dtype}")

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        shape: Sequence[int],
        chunks: Sequence[int],
        dtype: torch.dtype,
        manifest: Mapping[str, Description],
    ) -> ChunkStore:
        """A new store, or the one that an earlier run with the same manifest began.

        Raises:
            StoreError: Something else lies at `path`, or a store with another manifest.
            DtypeError: numpy has no such dtype.
            ImportError: zarr is not installed.
        """
        zarr = _zarr()
        if dtype is torch.bfloat16:
            raise DtypeError(
                "bfloat16 cannot be written, numpy has no such dtype: convert the model to float32"
            )
        path = Path(path)
        name = str(dtype).removeprefix("torch.")
        manifest = {**manifest, "shape": list(shape), "chunks": list(chunks), "dtype": name}
        _claim(path, manifest)
        if not (path / "zarr.json").exists():
            zarr.create_array(
                str(path),
                shape=tuple(shape),
                chunks=tuple(chunks),
                dtype=name,
                # A chunk that was damaged is an error when it is read.
                compressors=[zarr.codecs.Crc32cCodec()],
                fill_value=float("nan"),
            )
        array = _opened(path, "r+")
        found = (array.shape, array.chunks, str(array.dtype))
        expected = (tuple(shape), tuple(chunks), name)
        if found != expected:
            raise StoreError(
                f"{path} holds an array of (shape, chunks, dtype) {found}, its manifest says "
                f"{expected}: delete it"
            )
        store = cls(path, array)
        if logger.isEnabledFor(logging.INFO):
            absent, total = sum(map(len, store.missing().values())), prod(store.grid[:2])
            logger.info("%s: %d of %d chunks are there", path, total - absent, total)
        return store

    @property
    def chunks(self) -> tuple[int, ...]:
        """The shape of a chunk."""
        return tuple(self.array.chunks)

    @property
    def grid(self) -> tuple[int, ...]:
        """How many chunks there are along each dimension."""
        return tuple(-(-s // c) for s, c in zip(self.array.shape, self.chunks, strict=True))

    def _file(self, place: Sequence[int]) -> Path:
        whole = (*place, *[0] * (self.array.ndim - len(place)))
        return self._path.joinpath("c", *map(str, whole))

    def holds(self, place: Sequence[int]) -> bool:
        """Whether a chunk, by its first positions in the grid, was written and is whole."""
        file = self._file(place)
        return file.is_file() and file.stat().st_size == self._chunk_bytes

    @property
    def _chunk_bytes(self) -> int:
        return prod(self.chunks) * int(self.array.dtype.itemsize) + CHECKSUM_BYTES

    def missing(self) -> dict[int, set[int]]:
        """The chunks that are to be written: rows of the grid -> columns."""
        rows, columns = self.grid[:2]
        absent = {r: {c for c in range(columns) if not self.holds((r, c))} for r in range(rows)}
        return {row: some for row, some in absent.items() if some}

    def reader(self) -> ZarrArray:
        """The array, opened for reading."""
        return _opened(self._path, "r")

    def write(self, place: Sequence[int], values: Tensor) -> None:
        """Writes a whole chunk.

        Raises:
            StoreError: The values are of another shape.
        """
        region = tuple(
            slice(p * c, min((p + 1) * c, s))
            for p, c, s in zip(place, self.chunks, self.array.shape, strict=False)
        )
        within = (part.stop - part.start for part in region)
        expected = (*within, *self.array.shape[len(place) :])
        if tuple(values.shape) != expected:
            raise StoreError(f"values have shape {tuple(values.shape)}, expected {expected}")
        self.array[region] = values.detach().cpu().numpy()


def _opened(path: Path, mode: str) -> ZarrArray:
    try:
        array: ZarrArray = _zarr().open_array(str(path), mode=mode)
    except OSError:
        raise
    except Exception as error:  # whatever zarr says of a description that it cannot read
        raise StoreError(f"{path} holds no zarr array that can be read: {error}") from error
    return array


def _claim(path: Path, manifest: Mapping[str, Description]) -> None:
    """Makes sure that the directory is for the results of a manifest.

    The manifest is written first, so that a run that is killed at any moment leaves a directory
    that the next one understands.
    """
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file; a directory is written")
    path.mkdir(parents=True, exist_ok=True)
    for partial in path.rglob(f"*{PARTIAL}"):
        partial.unlink(missing_ok=True)
    stored = _stored_manifest(path)
    if stored is None:
        if any(path.iterdir()):
            raise StoreError(
                f"{path} is not empty and has no {MANIFEST}: it was not written by this "
                "computation; pass another path"
            )
        text = json.dumps(manifest, indent=1, sort_keys=True)
        write_whole(path / MANIFEST, lambda file: file.write(text.encode()))
        return
    differing = difference(stored, manifest)
    if differing:
        raise StoreError(
            f"{path} holds the results of another computation ({'; '.join(differing)}): pass "
            "another path, or delete it"
        )


def _stored_manifest(path: Path) -> dict[str, Description] | None:
    file = path / MANIFEST
    if not file.exists():
        return None
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise StoreError(f"{file} is not a manifest: {error}") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise StoreError(f"{file} is not a manifest of {FORMAT!r}")
    return stored
