"""What was fitted, as a file of tensors and numbers without any code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path

import torch
from torch import Tensor

from hessops.errors import StoreError
from hessops.files import digest_of_tensors, plain_content, write_whole
from hessops.influence.description import (
    Description,
    difference,
    digest_of_description,
    digest_of_objective,
)
from hessops.influence.fitted import FittedModel, TrainingData
from hessops.influence.kept import kept_of_tensors, tensors_of_kept
from hessops.objective import Objective
from hessops.operators.base import TensorOperator
from hessops.space import ParameterSpace

FORMAT = "hessops influence model 1"


@dataclass(frozen=True)
class SavedFit:
    """The content of a file, looked through.

    Attributes:
        path: Where it came from, for messages.
        parameters: A hash of the model's parameters and buffers.
        data: The training data.
        randomness: See `FittedModel`.
        mean_eigenvalues: Block name -> tr(A)/P, where it was needed.
        tensors: Block name -> what was kept of its curvature.
    """

    path: Path
    parameters: str
    data: TrainingData
    randomness: str
    mean_eigenvalues: Mapping[str, float]
    tensors: Mapping[str, Mapping[str, Tensor]]

    def require_parameters(self, objective: Objective) -> None:
        """Raises `StoreError` unless a model has the values that the fit was made at."""
        if digest_of_objective(objective) != self.parameters:
            raise StoreError(
                f"{self.path} was written for other parameters or buffers than the model has now: "
                "load the weights of that fit into the model, or fit again"
            )

    def require_data(self, fingerprint: str | None) -> None:
        """Raises `StoreError` unless these are the training points of the file."""
        stored = self.data.fingerprint or str(fingerprint)
        # One for each part of a composite curvature that passes over data.
        if fingerprint != stored and fingerprint not in stored.split():
            raise StoreError(
                f"{self.path} was written for other training data ({self.data.num_points} points) "
                "than dataloader gives"
            )

    def kept(self, block: str, space: ParameterSpace) -> TensorOperator:
        """What was kept of the curvature of a block.

        Raises:
            StoreError: It does not fit the parameters of the block.
        """
        try:
            return kept_of_tensors(block, self.tensors.get(block, {}), space)
        except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
            raise StoreError(
                f"{self.path} does not hold what was fitted for block {block!r}: {error}"
            ) from error


def save_fit(
    fitted: FittedModel,
    configuration: Mapping[str, Description],
    path: str | Path,
    *,
    with_kept: bool,
) -> None:
    """Writes a fit to a file, whole or not at all.

    Raises:
        StoreError: What was kept of a block is of a kind that cannot be written.
    """
    tensors = {
        name: _tensors_of(name, block.kept) if with_kept else {}
        for name, block in fitted.blocks.items()
    }
    means = {name: block.mean_eigenvalue for name, block in fitted.blocks.items()}
    content = {
        "format": FORMAT,
        "configuration": dict(configuration),
        "parameters": digest_of_objective(fitted.provider.objective),
        "data": asdict(fitted.data),
        "randomness": fitted.randomness,
        "mean_eigenvalues": {name: mean for name, mean in means.items() if mean is not None},
        "tensors": tensors,
        "checksum": _checksum(tensors, means),
    }
    write_whole(Path(path), lambda file: torch.save(content, file))


def _checksum(
    tensors: Mapping[str, Mapping[str, Tensor]], means: Mapping[str, float | None]
) -> str:
    """A hash of the numbers that a loaded model computes with."""
    digests = {name: digest_of_tensors(parts) for name, parts in tensors.items()}
    known = {name: mean.hex() for name, mean in means.items() if mean is not None}
    return digest_of_description({"tensors": dict(digests), "means": dict(known)})


def _tensors_of(block: str, kept: TensorOperator) -> dict[str, Tensor]:
    tensors = tensors_of_kept(kept)
    if tensors is None:
        raise StoreError(
            f"block {block!r} keeps a {type(kept).__name__}, which cannot be written; a model that "
            "sets needs_data=False must keep a MatrixOperator, a LowRankProductOperator or blocks "
            "of a KfacOperator"
        )
    return tensors


def load_fit(path: str | Path, configuration: Mapping[str, Description]) -> SavedFit:
    """Reads what `save_fit` wrote; nothing but tensors and plain values is ever unpickled.

    Raises:
        StoreError: It is something else, or of a model with another configuration.
        FileNotFoundError: There is no file.
    """
    path = Path(path)
    content = plain_content(path, "a fitted influence model")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StoreError(f"{path} is not a file of a fitted influence model ({FORMAT!r})")
    fields = [field.name for field in dataclass_fields(SavedFit)][1:]
    missing = [name for name in (*fields, "configuration", "checksum") if name not in content]
    if missing:
        raise StoreError(f"{path} lacks {missing}")
    differing = difference(content["configuration"], configuration)
    if differing:
        raise StoreError(
            f"{path} was written by a model with other settings: {'; '.join(differing)}"
        )
    if _checksum(content["tensors"], content["mean_eigenvalues"]) != content["checksum"]:
        raise StoreError(f"{path} is damaged: its numbers do not have the checksum they had")
    try:
        content["data"] = TrainingData(**content["data"])
    except TypeError as error:
        raise StoreError(f"{path} does not say which training data it is for: {error}") from error
    return SavedFit(path, *(content[name] for name in fields))
