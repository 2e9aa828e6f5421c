"""Descriptions and hashes of settings, parameters and data, for files that are read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from hessops.nested import named_tensor_leaves
from hessops.objective import Objective
from hessops.streaming import Batch

Description: TypeAlias = (
    "str | int | float | bool | list[Description] | dict[str, Description] | None"
)
# Packages whose versions a manifest has, or that change with Python.
_VERSIONED = ("hessops", "torch", "numpy", "scipy", "builtins", "abc", "typing", "collections")
# What an object is made of is followed this far.
MAX_DEPTH = 6


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and bits.

    Example:
        >>> import torch
        >>> from hessops.influence.description import digest_of_tensors
        >>> zero, minus = torch.zeros(1), -torch.zeros(1)
        >>> digest_of_tensors({"a": zero}) == digest_of_tensors({"a": minus})
        False
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def digest_of_batch(batch: Batch) -> str:
    """A hash of the inputs and targets of some points in their order."""
    leaves = named_tensor_leaves((batch.x, batch.y), "batch")
    return digest_of_tensors(dict(leaves))


def digest_of_state(module: nn.Module) -> str:
    """A hash of a module's class, parameters and buffers."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return hashlib.sha256(
        f"{_qualified(type(module))}|{digest_of_tensors(tensors)}".encode()
    ).hexdigest()


def digest_of_objective(objective: Objective) -> str:
    """A hash of the parameters and buffers of an objective's copy of its model."""
    return digest_of_state(objective.model)


def digest_of_generator(generator: torch.Generator | None) -> str:
    """A hash of the state that random numbers will be drawn from."""
    if generator is None:
        return f"seed {torch.initial_seed()}"
    return digest_of_tensors({"state": generator.get_state()})


def digest_of_description(description: Description) -> str:
    """A hash of what `describe` returns."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def describe(value: object, depth: int = MAX_DEPTH) -> Description:
    """What a setting is, in values that JSON has: equal settings have equal descriptions.

    A function is its name, its code and what it closes over; an object its class and attributes; a
    tensor a hash of its bits. No address in memory and no time has a part in it.

    Example:
        >>> from functools import partial
        >>> from hessops.influence.description import describe
        >>> describe(partial(max, key=len))["arguments"]
        {'key': 'builtins.len'}
    """
    if value is None or (isinstance(value, (bool, int, str)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        # As a number it is equal to the integer, and so is what it decides.
        return int(value) if value.is_integer() else value.hex()
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, Tensor):
        return digest_of_tensors({"tensor": value})
    if isinstance(value, nn.Module):
        return {
            "class": _qualified(type(value)),
            "state": digest_of_state(value),
            "repr": repr(value),
        }
    if isinstance(value, (torch.dtype, torch.device, torch.Size)):
        return str(value)
    if isinstance(value, torch.Generator):
        return f"seed {value.initial_seed()}"
    if depth == 0:
        return _qualified(type(value))
    return _composed(value, depth - 1)


def _composed(value: object, depth: int) -> Description:
    if isinstance(value, Mapping):
        return {str(key): describe(item, depth) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item, depth) for item in value]
    if isinstance(value, (set, frozenset)):
        return [str(item) for item in sorted(value, key=str)]
    if isinstance(value, np.ndarray):
        return hashlib.sha256(f"{value.shape}{value.dtype}".encode() + value.tobytes()).hexdigest()
    if isinstance(value, partial):
        return {
            "function": describe(value.func, depth),
            "positional": [describe(item, depth) for item in value.args],
            "arguments": {key: describe(item, depth) for key, item in value.keywords.items()},
        }
    if isinstance(value, MethodType):
        return {"of": describe(value.__self__, depth), "function": describe(value.__func__, depth)}
    if isinstance(value, FunctionType):
        return _function(value, depth)
    if isinstance(value, type):
        return describe_class(value)
    if not hasattr(value, "__dict__"):
        return _qualified(value if hasattr(value, "__qualname__") else type(value))
    names: Iterable[str] = (
        [field.name for field in fields(value)] if is_dataclass(value) else vars(value)
    )
    attributes = {name: describe(getattr(value, name), depth) for name in names}
    return {"class": describe_class(type(value)), **attributes}


def describe_class(kind: type) -> Description:
    """The name of a class; and the code of its methods, unless the version of a package is enough.

    Example:
        >>> from hessops.influence.description import describe_class
        >>> describe_class(dict)
        'builtins.dict'
    """
    methods: dict[str, Description] = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in _VERSIONED:
            continue
        for name, member in vars(base).items():
            member = getattr(member, "__func__", getattr(member, "fget", member))
            member = getattr(member, "__wrapped__", member)
            if isinstance(member, FunctionType):
                methods.setdefault(name, _code(member.__code__))
    if not methods:
        return _qualified(kind)
    return {"class": _qualified(kind), "methods": methods}


def describe_modules(module: nn.Module) -> Description:
    """The classes and plain attributes of a module and all inside, without their tensors."""
    return {
        name: {
            "class": describe_class(type(part)),
            "attributes": {
                key: describe(value)
                for key, value in vars(part).items()
                if not key.startswith("_") and key != "training" and _is_plain(value)
            },
        }
        for name, part in module.named_modules()
    }


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str, tuple, list, FunctionType, partial))


def _function(function: FunctionType, depth: int) -> Description:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return {
        "function": _qualified(function),
        "code": _code(function.__code__),
        "defaults": [describe(item, depth) for item in function.__defaults__ or ()],
        "closure": [describe(item, depth) for item in cells],
    }


def _code(code: CodeType) -> str:
    """A hash of instructions, names and constants, those of functions inside included."""
    digest = hashlib.sha256(code.co_code)
    digest.update("|".join(code.co_names).encode())
    digest.update("|".join(map(_constant, code.co_consts)).encode())
    return digest.hexdigest()


def _constant(value: object) -> str:
    if isinstance(value, CodeType):
        return _code(value)
    if isinstance(value, frozenset):  # its order differs from one process to another
        return str(sorted(map(_constant, value)))
    return str(list(map(_constant, value))) if isinstance(value, tuple) else repr(value)


def _qualified(value: object) -> str:
    module = getattr(value, "__module__", "") or ""
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{module}.{name}"


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def difference(stored: Mapping[str, Description], now: Mapping[str, Description]) -> list[str]:
    """What differs between two descriptions, as lines ``key: stored, now``.

    Example:
        >>> from hessops.influence.description import difference
        >>> difference({"a": 1, "b": 2}, {"a": 1, "b": 3})
        ['b: stored 2, now 3']
    """
    missing = "nothing"
    return [
        f"{key}: stored {_short(stored.get(key, missing))}, now {_short(now.get(key, missing))}"
        for key in dict.fromkeys([*stored, *now])
        if stored.get(key, missing) != now.get(key, missing)
    ]


def _short(value: Description, most: int = 120) -> str:
    text = str(value)
    return text if len(text) <= most else text[: most - 3] + "..."
