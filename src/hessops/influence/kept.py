"""What is kept of the curvature of a block, as tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hessops.functional.low_rank import LowRankProductRepresentation
from hessops.operators.base import TensorOperator
from hessops.operators.dense import MatrixOperator
from hessops.operators.eigen import EigenOperator
from hessops.operators.kronecker_file import block_of_tensors, tensors_of_block
from hessops.operators.low_rank import LowRankProductOperator
from hessops.space import ParameterSpace


def tensors_of_kept(kept: TensorOperator) -> dict[str, Tensor] | None:
    """What `kept_of_tensors` makes the same operator of; ``None`` for another kind of operator.

    Example:
        >>> import torch
        >>> from hessops import MatrixOperator
        >>> from hessops.influence.kept import tensors_of_kept
        >>> sorted(tensors_of_kept(MatrixOperator(torch.eye(2))))
        ['matrix', 'positive_semidefinite', 'symmetric']
    """
    if isinstance(kept, MatrixOperator):
        return {
            "matrix": kept.matrix.cpu(),
            "symmetric": torch.tensor(kept.symmetric is True),
            "positive_semidefinite": torch.tensor(kept.positive_semidefinite is True),
        }
    if isinstance(kept, LowRankProductOperator):
        pairs = kept.low_rank_representation
        return {
            "eigen_vals": pairs.eigen_vals.cpu(),
            "projections": pairs.projections.cpu(),
            "clipped": torch.tensor(pairs.clipped),
        }
    return tensors_of_block(kept) if isinstance(kept, EigenOperator) else None


def kept_of_tensors(
    name: str, tensors: Mapping[str, Tensor], space: ParameterSpace
) -> TensorOperator:
    """What was kept of the block of a name, from its tensors.

    Raises:
        KeyError, IndexError, HessopsError: The tensors are those of no block of these parameters.
    """
    there = {key: tensor.to(space.device) for key, tensor in tensors.items()}
    if "matrix" in there:
        return MatrixOperator(
            there["matrix"],
            symmetric=bool(there["symmetric"]) or None,
            positive_semidefinite=bool(there["positive_semidefinite"]) or None,
            space=space,
            copy=False,
        )
    if "projections" in there:
        pairs = LowRankProductRepresentation(
            there["eigen_vals"], there["projections"], bool(there["clipped"])
        )
        return LowRankProductOperator(pairs, space=space)
    return block_of_tensors(name, there, space)
