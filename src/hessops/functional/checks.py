"""Checks of products by random vectors: what torch gets wrong without an error."""

from __future__ import annotations

import torch
from torch import Tensor

from hessops.errors import ForwardModeError, ModelError
from hessops.functional.products import LinearFunction
from hessops.space import ParameterSpace


def excess_asymmetry(probes: Tensor, products: Tensor) -> float | None:
    """|⟨u, Av⟩ − ⟨v, Au⟩| / (‖Au‖ + ‖Av‖) where it is beyond rounding, and ``None`` where not.

    Args:
        probes: Normal random u and v, ``(2, n)``.
        products: Au and Av.
    """
    u, v = probes.double()
    au, av = products.double()
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-2}.get(probes.dtype, 0.3)
    # For normal u the form ⟨u, Av⟩ is of the size of ‖Av‖.
    difference, scale = (u.dot(av) - v.dot(au)).abs(), au.norm() + av.norm()
    # Negated, so that NaN is an excess.
    return None if difference <= tolerance * scale else (difference / scale).item()


def excess_difference(forward: Tensor, reverse: Tensor) -> float | None:
    """‖forward − reverse‖ / ‖reverse‖ where it is beyond rounding, and ``None`` where not."""
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(reverse.dtype, 5e-2)
    difference, scale = (forward - reverse).double().norm(), reverse.double().norm()
    return None if difference <= tolerance * scale else (difference / scale).item()


def random_probes(space: ParameterSpace, count: int, seed: int) -> Tensor:
    """Normal random vectors ``(count, P)``, the same on every device; no generator advances.

    Example:
        >>> import torch
        >>> from hessops import ParameterSpace
        >>> from hessops.functional.checks import random_probes
        >>> random_probes(ParameterSpace.from_model(torch.nn.Linear(3, 2)), 5, seed=0).shape
        torch.Size([5, 8])
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rows = torch.randn(count, space.size, generator=generator, device="cpu")
    return rows.to(space.device, space.dtype)


def require_symmetry(
    product: LinearFunction, space: ParameterSpace, what: str, *, seed: int = 0
) -> None:
    """Compares ⟨u, Av⟩ with ⟨v, Au⟩ for two random vectors.

    A layer whose backward cannot be differentiated (``once_differentiable``, a ``detach`` or numpy
    inside a custom function) makes a Hessian product asymmetric without any error from torch.

    Args:
        product: The map V ↦ AV of stacks.
        space: Where the vectors live.
        what: Begins the message: "the products of X".
        seed: Of the vectors.

    Raises:
        ModelError: A is not symmetric.

    Example:
        >>> import torch
        >>> from hessops import ParameterSpace
        >>> from hessops.functional.checks import require_symmetry
        >>> space = ParameterSpace.from_tensors({"x": torch.zeros(2)})
        >>> rotation = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> require_symmetry(lambda s: {"x": s["x"] @ rotation}, space, "rotations")
        Traceback (most recent call last):
        hessops.errors.ModelError: rotations are not symmetric ...
    """
    probes = random_probes(space, 2, seed)
    asymmetry = excess_asymmetry(probes, space.flatten(product(space.unflatten(probes))))
    if asymmetry is not None:
        raise ModelError(
            f"{what} are not symmetric "
            f"(by {asymmetry:.1e} relative), so that second derivatives of this model "
            "or loss are wrong: a custom autograd.Function whose backward is not "
            "differentiable? Write the layer in torch operations"
        )


def require_forward_agreement(
    forward: LinearFunction,
    reverse: LinearFunction,
    space: ParameterSpace,
    what: str,
    *,
    seed: int = 0,
) -> None:
    """Compares a product in forward mode with the same in reverse mode, for one random vector.

    Stronger than the adjoint identity ⟨u, Jv⟩ = ⟨Jᵀu, v⟩ for one u: reverse mode gives the product
    itself.

    Args:
        forward: The map of stacks to check.
        reverse: The same map in reverse mode.
        space: Where the vectors live.
        what: Begins the message: "mode='rev-fwd'".
        seed: Of the vector.

    Raises:
        ForwardModeError: The products differ, or forward mode gives NaN.

    Example:
        >>> import torch
        >>> from hessops import ParameterSpace
        >>> from hessops.functional.checks import require_forward_agreement
        >>> space = ParameterSpace.from_tensors({"x": torch.zeros(2)})
        >>> require_forward_agreement(
        ...     lambda s: {"x": 2 * s["x"]}, lambda s: {"x": s["x"]}, space, "the product"
        ... )
        Traceback (most recent call last):
        hessops.errors.ForwardModeError: the product differs from reverse mode by ...
    """
    probe = space.unflatten(random_probes(space, 1, seed))
    difference = excess_difference(space.flatten(forward(probe)), space.flatten(reverse(probe)))
    if difference is not None:
        raise ForwardModeError(
            f"{what} differs from reverse mode by "
            f"{difference:.1e} relative (a layer whose forward derivative torch gets "
            "wrong, such as LayerNorm or Embedding(padding_idx=...)); use mode='rev-rev'"
        )
