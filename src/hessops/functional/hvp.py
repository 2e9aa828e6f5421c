"""Hessian-vector products of plain functions, composable with `torch.func`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from hessops.errors import (
    ArgumentTypeError,
    DtypeError,
    ForwardModeError,
    HessopsError,
    ParameterNameError,
    ShapeError,
)
from hessops.functional.checks import excess_difference
from hessops.isolation import (
    is_transformed,
    twice_differentiable_kernels,
    without_autocast,
    without_remarks,
)
from hessops.nested import named_tensor_leaves, tensor_leaves

Structure = TypeVar("Structure", bound=Tensor | Sequence[Tensor] | Mapping[str, Tensor])
# Functions whose forward derivatives have been compared with reverse mode.
_COMPARED: weakref.WeakSet[Callable[..., object]] = weakref.WeakSet()


def hvp(
    func: Callable[[Structure], Tensor],
    params: Structure,
    vec: Structure,
    reverse_only: bool = True,
) -> Structure:
    r"""The product of the Hessian of a scalar function with a vector.

    .. math:: H v = \nabla_\theta \langle \nabla_\theta f(\theta), v\rangle

    (Pearlmutter 1994). Composes with `torch.func` (``vmap`` over vectors, say), and can be
    differentiated again where `params` or `vec` record gradients: layers of which torch gets a
    third derivative wrong are written out.

    Args:
        func: From `params` to a tensor with a single element.
        params: A tensor, a list or tuple of tensors, or a mapping of tensors.
        vec: Of the same structure, shapes and dtype; the order of keys means nothing.
        reverse_only: ``False`` uses forward over reverse mode. Torch gets some forward derivatives
            wrong, so the first product of each function is compared with reverse mode (not within
            a transform, where values are hidden).

    Returns:
        Hv, of the structure of `params`.

    Raises:
        ParameterNameError: Keys or lengths of `vec` and `params` differ.
        ShapeError: A shape differs, or `func` returns more than one element.
        DtypeError: A dtype differs or is not real floating point.
        ForwardModeError: Forward mode differs from reverse mode.

    Example:
        >>> import torch
        >>> from hessops.functional import hvp
        >>> params = {"x": torch.tensor([1.0, 2.0])}
        >>> hvp(lambda p: (p["x"] ** 3).sum(), params, {"x": torch.ones(2)})
        {'x': tensor([ 6., 12.])}
    """
    aligned = _aligned(params, vec)
    gradient = grad(single_element(func))
    with product_state(params):
        if reverse_only:
            result: Structure = vjp(gradient, params)[1](aligned)[0]
            return result
        with explaining_forward_mode():
            result = jvp(gradient, (params,), (aligned,))[1]
        leaves = list(tensor_leaves((params, aligned)))
        if not any(is_transformed(t) for t in leaves) and not _is_compared(func):
            require_equal_modes(result, vjp(gradient, params)[1](aligned)[0])
            _remember(func)
        return result


@contextmanager
def product_state(tensors: object) -> Iterator[None]:
    """The torch state for products of plain functions: explicit layers, no autocast."""
    device = next(tensor_leaves(tensors)).device
    with (
        without_remarks(),
        without_autocast(device),
        twice_differentiable_kernels(with_explicit_layers=True),
    ):
        yield


def single_element(
    func: Callable[..., Tensor], error: type[HessopsError] = ShapeError
) -> Callable[..., Tensor]:
    """The function with its single element as a tensor ``()``."""

    def scalar(*arguments: Any) -> Tensor:
        value = func(*arguments)
        if not isinstance(value, Tensor):
            raise ArgumentTypeError(f"func must return a tensor, got {type(value).__name__}")
        if value.numel() != 1:
            raise error(
                f"func must return a single element, got a tensor of shape {tuple(value.shape)}"
            )
        return value.reshape(())

    return scalar


def pull_rows(pull: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor) -> Tensor:
    """A vector-Jacobian product ``(n,)`` to ``(n,)`` over rows, vectorised where torch can."""
    if len(rows) == 1:
        return pull(rows[0])[0].unsqueeze(0)
    try:
        vectorised: Tensor = vmap(pull)(rows)[0]
        return vectorised
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):  # a kernel without a batching rule
        return torch.stack([pull(row)[0] for row in rows])


@contextmanager
def explaining_forward_mode() -> Iterator[None]:
    """Says of a kernel without a forward derivative what to do instead."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise ForwardModeError(
            f"forward mode fails on this function ({error}); use reverse mode"
        ) from error


def require_equal_modes(forward: object, reverse: object) -> None:
    """Compares one product in both modes.

    Raises:
        ForwardModeError: They differ beyond rounding.
    """
    difference = excess_difference(_flat(forward), _flat(reverse))
    if difference is not None:
        raise ForwardModeError(
            f"forward mode differs from reverse mode by {difference:.1e} "
            "relative: torch gets a forward derivative of this function wrong; use reverse mode"
        )


def _flat(tensors: object) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensor_leaves(tensors)])


def _is_compared(func: Callable[..., object]) -> bool:
    try:
        return func in _COMPARED
    except TypeError:
        return False


def _remember(func: Callable[..., object]) -> None:
    with suppress(TypeError):  # not hashable, or without weak references: compared every time
        _COMPARED.add(func)


def _aligned(params: Structure, vec: Structure) -> Structure:
    """`vec` with its keys in the order of `params`, every entry checked."""
    if isinstance(params, Mapping) and isinstance(vec, Mapping):
        if set(params) != set(vec):
            raise ParameterNameError(
                f"vec has the keys {list(vec)}, params has {list(params)}; they must be the same"
            )
        ordered = {key: vec[key] for key in params}
        vec = ordered if type(params) is dict else type(params)(ordered)  # type: ignore[call-arg, assignment]  # Mapping declares no constructor
    expected = dict(named_tensor_leaves(params, "params"))
    given = dict(named_tensor_leaves(vec, "params"))
    if not expected:
        raise ArgumentTypeError(
            f"params must be a tensor or a structure of tensors, got {type(params).__name__}"
        )
    if list(expected) != list(given):
        raise ParameterNameError(
            f"vec must have the structure of params, {list(expected)}; got {list(given)}"
        )
    for name, tensor in expected.items():
        if not tensor.is_floating_point():
            raise DtypeError(
                f"{name} is {tensor.dtype}; only real floating-point tensors can be differentiated "
                "by"
            )
        require_like(given[name], tensor, name.replace("params", "vec", 1))
    return vec


def require_like(given: Tensor, expected: Tensor, name: str) -> None:
    """The shape and dtype of another tensor.

    Raises:
        ShapeError, DtypeError: As their names say.
    """
    if given.shape != expected.shape:
        raise ShapeError(f"{name} has shape {tuple(given.shape)}, expected {tuple(expected.shape)}")
    if given.dtype != expected.dtype:
        raise DtypeError(f"{name} is {given.dtype}, expected {expected.dtype}")
