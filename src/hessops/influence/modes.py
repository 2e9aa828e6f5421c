"""The choices that an influence model offers by name."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from hessops.errors import ArgumentError

_Mode = TypeVar("_Mode", bound=StrEnum)


class InfluenceMode(StrEnum):
    """What of a training point is varied.

    Members and their names as strings, in any case, mean the same everywhere.

    Example:
        >>> from hessops.influence import InfluenceMode
        >>> InfluenceMode("up") is InfluenceMode.UP, InfluenceMode.UP == "up"
        (True, True)
    """

    UP = "up"
    """Its weight in the training loss."""

    PERTURBATION = "perturbation"
    """Its input."""


class BlockMode(StrEnum):
    """Which parameters interact in the curvature.

    Between blocks the curvature counts as zero, and each block is inverted alone. Members and their
    names as strings, in any case, mean the same everywhere. `InfluenceFunctionModel` takes blocks
    of one's own, too.
    """

    FULL = "full"
    """One block of all parameters, named ``"full"``."""

    LAYER_WISE = "layer_wise"
    """A block for each module with parameters of its own, named as in ``model.named_modules()``."""

    PARAMETER_WISE = "parameter_wise"
    """A block for each entry of ``model.named_parameters()``, named as there."""


class SecondOrderMode(StrEnum):
    """Which curvature of the mean training loss.

    Members and their names as strings, in any case, mean the same everywhere.
    """

    HESSIAN = "hessian"
    """See `hessops.HessianOperator`."""

    GAUSS_NEWTON = "gauss_newton"
    """The empirical one; see `hessops.GaussNewtonOperator`."""

    GENERALIZED_GAUSS_NEWTON = "generalized_gauss_newton"
    """See `hessops.GeneralizedGaussNewtonOperator`."""


def checked_mode(value: object, kind: type[_Mode], name: str) -> _Mode:
    """A member of an enumeration, from itself or its name in any case.

    Raises:
        ArgumentError: Anything else.
    """
    if isinstance(value, str):
        for member in kind:
            if value.lower() == member.value:
                return member
    choices = ", ".join(repr(member.value) for member in kind)
    raise ArgumentError(
        f"{name} must be one of {choices}, or a member of {kind.__name__}, got {value!r}"
    )
