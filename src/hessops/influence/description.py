"""Descriptions and hashes of settings, parameters and data, for files that are read again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GenericAlias,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from hessops.files import digest_of_tensors
from hessops.nested import named_tensor_leaves, plain_leaves
from hessops.objective import Objective
from hessops.streaming import Batch

Description: TypeAlias = (
    "str | int | float | bool | list[Description] | dict[str, Description] | None"
)
# What an object is made of is followed this far.
MAX_DEPTH, MAX_DEPTH_OF_GLOBALS = 6, 3
_NAMED_BY_REPR = (
    bytes,
    complex,
    range,
    slice,
    Decimal,
    Fraction,
    GenericAlias,
    torch.dtype,
    torch.device,
    torch.Size,
)
# What every module has, and what every class that is written in C.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_OF_CLASSES = (GetSetDescriptorType, MemberDescriptorType, WrapperDescriptorType)


def digest_of_batch(batch: Batch) -> str:
    """A hash of the inputs and targets of some points in their order."""
    leaves = dict(named_tensor_leaves((batch.x, batch.y), "batch"))
    plain = repr(list(plain_leaves((batch.x, batch.y))))
    return hashlib.sha256(f"{digest_of_tensors(leaves)}{plain}".encode()).hexdigest()


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

    A function is its name, its code, its defaults and what it closes over and reads from its
    module; an object its class and attributes; a tensor a hash of its bits. No address in memory
    and no time has a part in it.

    Example:
        >>> from functools import partial
        >>> from hessops.influence.description import describe
        >>> describe(partial(max, key=len))["arguments"]
        {'key': 'builtins.len'}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # As a number it is equal to the integer, and so is what it decides.
        return int(value) if value.is_integer() else value.hex()
    if isinstance(value, Tensor):
        return digest_of_tensors({"tensor": value})
    if isinstance(value, torch.Generator):
        return digest_of_generator(value)
    if isinstance(value, _NAMED_BY_REPR):
        return repr(value)
    if isinstance(value, ModuleType):
        return value.__name__
    if depth == 0:
        return _qualified(type(value))
    return _composed(value, depth - 1)


def _composed(value: object, depth: int) -> Description:
    if isinstance(value, nn.Module):
        return {"modules": describe_modules(value, depth), "state": digest_of_state(value)}
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
        return describe_class(value, depth)
    if isinstance(value, BuiltinFunctionType) or hasattr(value, "__qualname__"):
        return _qualified(value)
    return {"class": describe_class(type(value), depth), **_attributes(value, depth)}


def _attributes(value: object, depth: int) -> dict[str, Description]:
    """What an object holds, in its dictionary and in slots."""
    slots = [n for base in type(value).__mro__ for n in getattr(base, "__slots__", ())]
    names = [*getattr(value, "__dict__", ()), *(n for n in slots if hasattr(value, n))]
    return {name: describe(getattr(value, name), depth) for name in names if name != "__dict__"}


def describe_class(kind: type, depth: int = MAX_DEPTH) -> Description:
    """The name of a class; and what is in it, unless a package brings it.

    Example:
        >>> from hessops.influence.description import describe_class
        >>> describe_class(dict)
        'builtins.dict'
    """
    content: dict[str, Description] = {}
    for base in kind.__mro__:
        if _is_installed(base.__module__):
            continue
        for name, member in vars(base).items():
            member = getattr(member, "__func__", getattr(member, "fget", member))
            member = getattr(member, "__wrapped__", member)
            if isinstance(member, FunctionType):
                content.setdefault(name, _function(member, depth - 1) if depth else "")
            elif not name.startswith("__") and not isinstance(member, _OF_CLASSES):
                content.setdefault(name, describe(member, max(depth - 1, 0)))
    return {"class": _qualified(kind), "content": content} if content else _qualified(kind)


def describe_modules(module: nn.Module, depth: int = MAX_DEPTH) -> Description:
    """The classes, attributes and hooks of a module and all inside, without their parameters."""
    return {
        name: {
            "class": describe_class(type(part), depth),
            "attributes": {
                key: describe(value, depth)
                for key, value in vars(part).items()
                if key not in _OF_EVERY_MODULE
            },
            "training": part.training,
            "hooks": [
                describe(hook, depth)
                for hooks in (part._forward_pre_hooks, part._forward_hooks)
                for hook in hooks.values()
            ],
        }
        for name, part in module.named_modules()
    }


def _is_installed(module: str) -> bool:
    """Whether the code of a module is a package's or Python's own, and not the user's."""
    root = module.partition(".")[0]
    if root == "hessops" or root in sys.stdlib_module_names - {"__main__"}:
        return True
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _function(function: FunctionType, depth: int) -> Description:
    if _is_installed(function.__module__ or "") and function.__closure__ is None:
        return _qualified(function)
    described: dict[str, Description] = {
        "function": _qualified(function),
        "code": _code(function.__code__),
    }
    parts = {
        "defaults": [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()],
        "closure": [_content(cell) for cell in function.__closure__ or ()],
        "globals": [
            (name, function.__globals__[name])
            for name in _names_in(function.__code__)
            if name in function.__globals__
        ],
    }
    for name, values in parts.items():
        # What is read from the module may lead far.
        deep = min(depth, MAX_DEPTH_OF_GLOBALS) if name == "globals" else depth
        if values:
            described[name] = [describe(value, deep) for value in values]
    return described


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return "nothing"


def _names_in(code: CodeType) -> list[str]:
    """The names that a function and the functions inside it may read from their module."""
    inside = [name for c in code.co_consts if isinstance(c, CodeType) for name in _names_in(c)]
    return list(dict.fromkeys([*code.co_names, *inside]))


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
