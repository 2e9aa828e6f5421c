"""Blocks: which parameters an influence model lets interact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from hessops.errors import ArgumentTypeError, ParameterNameError, UncoveredParametersWarning
from hessops.influence.modes import BlockMode, checked_mode
from hessops.space import ParameterSpace
from hessops.warn import warn

BlockStructure = BlockMode | str | Mapping[str, Sequence[str]]
FULL = "full"


def blocks_of(
    model: nn.Module, block_structure: BlockStructure
) -> tuple[ParameterSpace, dict[str, ParameterSpace]]:
    """The covered parameters in the model's order, and the blocks that they are cut into.

    Args:
        model: Any module.
        block_structure: A `BlockMode` or its name; or block name -> names of parameters.

    Raises:
        ArgumentTypeError, ArgumentError: `block_structure` is something else.
        ParameterNameError: An unknown or frozen parameter, one in two blocks, or an empty block.
        ModelError, DtypeError, DeviceError: Of the model; see `ParameterSpace.from_model`.

    Example:
        >>> import torch
        >>> from hessops.influence.blocks import blocks_of
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> space, blocks = blocks_of(model, "layer_wise")
        >>> {name: block.names for name, block in blocks.items()}
        {'0': ('0.weight', '0.bias'), '1': ('1.weight', '1.bias')}
    """
    if isinstance(block_structure, Mapping):
        return _named_blocks(model, block_structure)
    if not isinstance(block_structure, str):
        raise ArgumentTypeError(
            "block_structure must be a BlockMode or a mapping from block names to lists of "
            f"parameter names, got {type(block_structure).__name__}"
        )
    space = ParameterSpace.from_model(model)
    return space, space.partition(_grouped(space, block_structure))


def _grouped(space: ParameterSpace, mode: str) -> dict[str, list[str]]:
    """The parameters by block, for the modes that have a name."""
    mode = checked_mode(mode, BlockMode, "block_structure")
    if mode is BlockMode.FULL:
        return {FULL: list(space.names)}
    if mode is BlockMode.PARAMETER_WISE:
        return {name: [name] for name in space.names}
    layers: dict[str, list[str]] = {}
    for name in space.names:
        # The module that owns it; the model itself has the name "".
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return layers


def _named_blocks(
    model: nn.Module, blocks: Mapping[str, Sequence[str]]
) -> tuple[ParameterSpace, dict[str, ParameterSpace]]:
    if not blocks:
        raise ParameterNameError("block_structure is empty: name at least one block")
    for block, names in blocks.items():
        if not isinstance(block, str):
            raise ArgumentTypeError(f"block_structure must have names as keys, got {block!r}")
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise ArgumentTypeError(
                f"block_structure[{block!r}] must be a list of parameter names, got {names!r}"
            )
        if not names:
            raise ParameterNameError(f"block_structure[{block!r}] is empty: name a parameter")
    covered = ParameterSpace.from_model(
        model, [name for names in blocks.values() for name in names]
    )
    spaces = covered.split(blocks)
    everything = ParameterSpace.from_model(model).names
    left_out = [name for name in everything if name not in covered.shapes]
    if left_out:
        warn(
            f"block_structure leaves out the parameters {left_out}: influences are as if those "
            "were constants. Freeze them (requires_grad_(False)) to say so, or add them to a block",
            UncoveredParametersWarning,
        )
    return covered, spaces
