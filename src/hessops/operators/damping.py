"""Damping: how much of the identity is added to each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hessops.errors import ArgumentError, ParameterNameError
from hessops.operators.base import TensorOperator
from hessops.operators.probing import exact_diagonal, rademacher_products
from hessops.randomness import resolved_generator
from hessops.validation import checked_number, checked_regularization

# Up to this size the trace is computed exactly, by as many products.
EXACT_TRACE_SIZE = 512
# Probes beyond it; the relative standard error is at most sqrt(2 / probes) of ‖A‖_F / tr A.
TRACE_PROBES = 128


@dataclass(frozen=True)
class Damping:
    r"""A regularization relative to the scale of each block.

    .. math:: \lambda_b = c\, \frac{\mathrm{tr}\, A_b}{P_b}

    the fraction c of the mean eigenvalue of the block, as in Kwon et al. (2024) and Grosse et al.
    (2023), who take 0.1. The trace is exact for blocks of up to 512 parameters and wherever the
    block is known as a matrix, and estimated by 128 random probes elsewhere (Hutchinson 1990).

    Attributes:
        relative: c >= 0.

    Raises:
        ArgumentTypeError, ArgumentError: `relative` is not a number >= 0.

    Example:
        >>> import torch
        >>> from hessops import Damping
        >>> from hessops.influence import DirectInfluence
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # the Hessian has eigenvalues 1 and 4
        >>> influence = DirectInfluence(model, torch.nn.MSELoss(), Damping(relative=0.1))
        >>> influence.fit([(x, torch.zeros(2, 1))]).fitted_regularization
        {'full': 0.25}
    """

    relative: float

    def __post_init__(self) -> None:
        value = checked_number(self.relative, "relative", minimum=0)
        object.__setattr__(self, "relative", value)


BlockRegularization = float | Damping | None
Regularization = (
    BlockRegularization | Mapping[str, BlockRegularization] | Sequence[BlockRegularization]
)


def by_block(regularization: Regularization, blocks: Sequence[str]) -> dict[str, float | Damping]:
    """The regularization of every block, from one for all, a mapping, or a sequence in their order.

    Raises:
        ArgumentTypeError, ArgumentError: A value that is no regularization, or too many or few.
        ParameterNameError: A block that is unknown or missing.
    """
    values: list[object]
    if isinstance(regularization, Mapping):
        if set(regularization) != set(blocks):
            raise ParameterNameError(
                f"regularization names the blocks {list(regularization)}, the model has "
                f"{list(blocks)}"
            )
        values = [regularization[name] for name in blocks]
    elif isinstance(regularization, Sequence) and not isinstance(regularization, (str, bytes)):
        if len(regularization) != len(blocks):
            raise ArgumentError(
                f"regularization has {len(regularization)} entries for {len(blocks)} blocks "
                f"{list(blocks)}"
            )
        values = list(regularization)
    else:
        values = [regularization] * len(blocks)
    return {name: _checked(value) for name, value in zip(blocks, values, strict=True)}


def _checked(value: object) -> float | Damping:
    return value if isinstance(value, Damping) else checked_regularization(value)


def resolved(damping: float | Damping, mean_eigenvalue: float | None, block: str) -> float:
    """λ of a block.

    Raises:
        ArgumentError: A relative damping of a block whose mean eigenvalue is not positive.
    """
    if not isinstance(damping, Damping) or mean_eigenvalue is None:
        return 0.0 if isinstance(damping, Damping) else damping
    if mean_eigenvalue <= 0:
        raise ArgumentError(
            f"regularization={damping!r} is relative to the mean eigenvalue of block {block!r}, "
            f"which is {mean_eigenvalue:.3e}; pass an absolute one, or use a Gauss-Newton matrix"
        )
    return damping.relative * mean_eigenvalue


def mean_eigenvalue(operator: TensorOperator, generator: torch.Generator | None = None) -> float:
    r""":math:`\mathrm{tr}(A)/n`: exact where it is at hand or A is small, by probes elsewhere.

    Args:
        operator: A.
        generator: Draws the probes; without one, `torch.manual_seed` decides.

    Example:
        >>> import torch
        >>> from hessops import DiagonalOperator
        >>> from hessops.operators.damping import mean_eigenvalue
        >>> mean_eigenvalue(DiagonalOperator(torch.tensor([1.0, 3.0])))
        2.0
    """
    size = operator.input_size
    known = operator._exact_trace()
    if known is not None:
        return known / size
    if size <= EXACT_TRACE_SIZE:
        return exact_diagonal(operator).mean().item()
    pairs = rademacher_products(operator, TRACE_PROBES, resolved_generator(generator))
    return sum((signs * products).sum().item() for signs, products in pairs) / TRACE_PROBES / size
