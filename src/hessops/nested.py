"""Tensors nested in tuples, lists and mappings: inputs, targets and outputs of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], object], nested: object) -> object:
    """Applies `function` to every tensor and keeps containers and everything else as they are.

    Args:
        function: What becomes of a tensor.
        nested: A tensor, or tuples (named ones too), lists and mappings of them in any nesting.

    Returns:
        The same nesting with the tensors replaced.
    """
    if isinstance(nested, Tensor):
        return function(nested)
    if isinstance(nested, tuple):
        items = tuple(map_tensors(function, item) for item in nested)
        make_named = getattr(nested, "_make", None)
        return items if make_named is None else make_named(items)
    if isinstance(nested, list):
        return [map_tensors(function, item) for item in nested]
    if isinstance(nested, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in nested.items()}
        return mapped if type(nested) is dict else _like(nested, mapped)
    return nested


def _like(original: Mapping[object, object], items: dict[object, object]) -> object:
    """Rebuilds a mapping subclass (an output class of a model hub, say) around other values."""
    try:
        return type(original)(items)  # type: ignore[call-arg]  # Mapping declares no constructor
    except TypeError:
        return items


def tensor_leaves(nested: object) -> Iterator[Tensor]:
    """Yields the tensors of a nesting in a fixed order: position, then order of the keys."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (tuple, list)):
        for item in nested:
            yield from tensor_leaves(item)
    elif isinstance(nested, Mapping):
        for value in nested.values():
            yield from tensor_leaves(value)


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in `dtype` where it is real floating point of more bytes, else the tensor itself."""
    is_wider = tensor.is_floating_point() and tensor.element_size() > dtype.itemsize
    return tensor.to(dtype) if is_wider else tensor


def plain_leaves(nested: object) -> Iterator[bool | int | float | complex | str | bytes]:
    """Yields the numbers and strings of a nesting in the order of `tensor_leaves`."""
    if isinstance(nested, (bool, int, float, complex, str, bytes)):
        yield nested
    elif isinstance(nested, (tuple, list)):
        for item in nested:
            yield from plain_leaves(item)
    elif isinstance(nested, Mapping):
        for value in nested.values():
            yield from plain_leaves(value)


def differentiable_leaves(nested: object) -> list[Tensor]:
    """The floating-point tensors of a nesting, in the order of `tensor_leaves`."""
    return [tensor for tensor in tensor_leaves(nested) if tensor.is_floating_point()]


def named_tensor_leaves(nested: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a nesting with the expression that reaches them, for messages."""
    if isinstance(nested, Tensor):
        yield name, nested
    elif isinstance(nested, (tuple, list)):
        for position, item in enumerate(nested):
            yield from named_tensor_leaves(item, f"{name}[{position}]")
    elif isinstance(nested, Mapping):
        for key, value in nested.items():
            yield from named_tensor_leaves(value, f"{name}[{key!r}]")
