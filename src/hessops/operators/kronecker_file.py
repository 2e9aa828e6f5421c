"""Eigen-decompositions by blocks, as files of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from hessops.errors import StoreError
from hessops.files import digest_of_tensors, plain_content, write_whole
from hessops.functional.layers import MatrixForm
from hessops.objective import Objective
from hessops.operators.eigen import DenseEigenOperator, DiagonalEigenOperator, EigenOperator
from hessops.operators.eigen_blocks import BlockEigenOperator
from hessops.operators.kronecker_block import KroneckerOperator
from hessops.space import ParameterSpace, RestrictTo

FORMAT = "hessops Kronecker factors 1"
_KRONECKER = ("eigenvalues", "form", "output_basis")
_FACTORS = ("output_eigenvalues", "input_eigenvalues")


def tensors_of_block(block: EigenOperator) -> dict[str, Tensor] | None:
    """What `block_of_tensors` makes the same operator of; ``None`` for another kind of operator.

    Example:
        >>> import torch
        >>> from hessops import ParameterSpace
        >>> from hessops.operators.eigen import DiagonalEigenOperator
        >>> from hessops.operators.kronecker_file import block_of_tensors, tensors_of_block
        >>> space = ParameterSpace.from_tensors({"a": torch.zeros(2)})
        >>> block = DiagonalEigenOperator(torch.tensor([1.0, 4.0]), space=space)
        >>> block_of_tensors("a", tensors_of_block(block), space).trace()
        5.0
    """
    if isinstance(block, KroneckerOperator):
        form, names = block.form, block.form.space.names
        bias = -1 if form.bias is None else names.index(form.bias)
        tensors = {
            "eigenvalues": block.eigenvalues,
            "output_basis": block.output_basis,
            "form": torch.tensor([names.index(form.weight), bias, form.groups, form.transposed]),
        }
        if block.input_basis is not None:
            tensors["input_basis"] = block.input_basis
        if block.factor_eigenvalues is not None:
            tensors |= dict(zip(_FACTORS, block.factor_eigenvalues, strict=True))
    elif isinstance(block, DenseEigenOperator):
        tensors = {"eigenvalues": block.eigenvalues, "basis": block.basis}
    elif isinstance(block, DiagonalEigenOperator):
        tensors = {"eigenvalues": block.eigenvalues}
    else:
        return None
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def block_of_tensors(
    name: str, tensors: Mapping[str, Tensor], space: ParameterSpace
) -> EigenOperator:
    """A block that `tensors_of_block` took apart.

    Raises:
        KeyError, IndexError, HessopsError: The tensors are those of no block of these parameters.
    """
    there = {key: tensor.to(space.device) for key, tensor in tensors.items()}
    values = there["eigenvalues"]
    if "form" in there:
        weight, bias, groups, transposed = (int(v) for v in there["form"])
        names = space.names
        form = MatrixForm(
            space, names[weight], names[bias] if bias >= 0 else None, groups, bool(transposed)
        )
        groups, outputs, inputs = form.shape
        factors = [there[key] for key in _FACTORS if key in there]
        return KroneckerOperator(
            form,
            values.reshape(form.shape),
            there["output_basis"],
            there.get("input_basis"),
            factor_eigenvalues=(factors[0], factors[1]) if factors else None,
            label=f"Kronecker({name!r}, {outputs} x {inputs})",
        )
    if "basis" in there:
        return DenseEigenOperator(values, there["basis"], space=space, label=f"Exact({name!r})")
    return DiagonalEigenOperator(values, space=space, label=f"ExactDiagonal({name!r})")


def save_factors(
    operator: BlockEigenOperator,
    objective: Objective,
    settings: Mapping[str, str],
    path: str | Path,
) -> None:
    """Writes blocks to a file, whole or not at all.

    Args:
        operator: The blocks.
        objective: What they are of; a hash of its parameters and buffers is written.
        settings: How they came about, for whoever looks into the file.
        path: Where.

    Raises:
        StoreError: A block of another kind than KFAC and EKFAC have.
        OSError: Of the file system; an earlier file stays as it was.
    """
    blocks = {}
    for name, block in operator.blocks.items():
        tensors = tensors_of_block(block)
        if tensors is None:
            raise StoreError(f"block {name!r} is a {type(block).__name__}, which has no file form")
        blocks[name] = {"names": list(block.input_dict_structure), "tensors": tensors}
    content = {
        "format": FORMAT,
        "settings": dict(settings),
        "parameters": _digest_of(objective.model),
        "blocks": blocks,
        "checksum": _checksum(blocks),
    }
    write_whole(Path(path), lambda file: torch.save(content, file))


def load_factors(
    path: str | Path, model: nn.Module, restrict_to: RestrictTo | None = None
) -> BlockEigenOperator:
    """The operator that `KfacOperator.save` wrote, without the data it was made from.

    Args:
        path: The file. Nothing but tensors and plain values is read from it.
        model: The model, with the parameters and buffers that it had then.
        restrict_to: As it was given then.

    Returns:
        An operator with the same products, inverses, traces and determinants.

    Raises:
        StoreError: The file is something else, is damaged, or is of other parameters.
        FileNotFoundError: There is no file.
        HessopsError: As of `ParameterSpace.from_model`.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from hessops import KfacOperator, load_factors
        >>> model = torch.nn.Linear(2, 1)
        >>> data = [(torch.randn(8, 2), torch.randn(8, 1))]
        >>> K = KfacOperator(model, torch.nn.MSELoss(), data)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     K.save(f"{folder}/factors.pt")
        ...     same = load_factors(f"{folder}/factors.pt", model)
        >>> torch.equal(K.apply(torch.ones(3)), same.apply(torch.ones(3)))
        True
    """
    path = Path(path)
    content = plain_content(path, "Kronecker factors")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StoreError(f"{path} is not a file of Kronecker factors ({FORMAT!r})")
    space = ParameterSpace.from_model(model, restrict_to)
    try:
        stored = cast(Mapping[str, Mapping[str, object]], content["blocks"])
        if _checksum(stored) != content["checksum"]:
            raise StoreError(f"{path} is damaged: its numbers do not have the checksum they had")
        names = {name: cast(list[str], block["names"]) for name, block in stored.items()}
        pieces = space.partition(names)
        blocks = {
            name: block_of_tensors(name, cast(Mapping[str, Tensor], block["tensors"]), pieces[name])
            for name, block in stored.items()
        }
        operator = BlockEigenOperator(blocks, space=space)
        parameters = content["parameters"]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{path} does not hold factors of the parameters {list(space.names)}: {error}"
        ) from error
    if parameters != _digest_of(model):
        raise StoreError(
            f"{path} was written for other parameters or buffers than the model has now: load the "
            "weights of then into the model, or estimate again"
        )
    return operator


def _digest_of(model: nn.Module) -> str:
    named: Iterable[tuple[str, Tensor]] = (*model.named_parameters(), *model.named_buffers())
    return digest_of_tensors(dict(named))


def _checksum(blocks: Mapping[str, Mapping[str, object]]) -> str:
    every = {
        f"{name}|{block['names']}|{key}": tensor
        for name, block in blocks.items()
        for key, tensor in cast(Mapping[str, Tensor], block["tensors"]).items()
    }
    return digest_of_tensors(every)
