"""Copies and pickles that leave caches behind and say which part of an object has neither."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property, partial
from types import FrameType, FunctionType
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hessops.errors import CopyError

# How far inside a part its culprit is looked for.
MAX_DEPTH = 8
# What a message repeats of an error of Python or torch.
MESSAGE_LENGTH = 160

_Attempt = Callable[[Any], object]
_Object = TypeVar("_Object")


class Copyable:
    """An object whose copies and pickles are made part by part.

    `copy.copy` shares the parts; `copy.deepcopy` and `pickle` share nothing with the original, and
    parts that occur twice within an object occur once in its copy and in its pickle. What can be
    found again is left behind: the values of each `functools.cached_property`, and what a class
    names in ``_left_behind``.

    Before anything is written, a pickle is tried on what is no tensor: the error of Python names
    the function that is in the way, but not where it came from.

    Raises:
        CopyError: From `copy.deepcopy` and `pickle`: a part can be neither copied nor pickled.

    Example:
        >>> import copy, pickle, torch
        >>> from hessops import HessianOperator
        >>> def operator():
        ...     def loss(output, target):
        ...         return (output - target).square().mean()
        ...
        ...     return HessianOperator(torch.nn.Linear(1, 1), loss, [(torch.eye(1), torch.eye(1))])
        >>> copy.deepcopy(operator()).apply(torch.ones(2))
        tensor([4., 4.])
        >>> pickle.dumps(operator())
        Traceback (most recent call last):
        hessops.errors.CopyError: the loss of ... (function) cannot be pickled ...
    """

    # Attribute -> what the user knows it as.
    _names_of_parts: ClassVar[Mapping[str, str]] = {}
    # Attributes that are ``None`` in copies and pickles, until they are found again.
    _left_behind: ClassVar[Collection[str]] = ()

    def __getstate__(self) -> object:
        """The attributes, without what is left behind."""
        state = super().__getstate__()
        if not isinstance(state, dict):  # none, or slots of a subclass beside them
            return state
        held = {name: value for name, value in state.items() if not _is_cached(self, name)}
        return held | dict.fromkeys(self._left_behind)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What a pickler takes; refused here where it would fail."""
        reduced = super().__reduce_ex__(protocol)
        if not _is_taken_by_value():
            for name, part in _parts(_state_of(reduced)).items():
                self._require(_try_to_pickle, name, part, "pickled")
        return reduced

    def __copy__(self) -> Self:
        reduced: Any = super().__reduce_ex__(4)
        twin: Self = reduced[0](*reduced[1])
        return _with_state(twin, _state_of(reduced))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        reduced: Any = super().__reduce_ex__(4)
        twin: Self = reduced[0](*copy.deepcopy(reduced[1], memo))
        memo[id(self)] = twin
        state = _state_of(reduced)
        copies = {n: self._copied(n, part, memo) for n, part in _parts(state).items()}
        return _with_state(twin, copies if isinstance(state, dict) else copies.get("state"))

    def _copied(self, name: str, part: object, memo: dict[int, Any]) -> object:
        try:
            return copy.deepcopy(part, memo)
        except (CopyError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            self._require(copy.deepcopy, name, part, "copied")
            raise

    def _require(self, attempt: _Attempt, name: str, part: object, verb: str) -> None:
        """Raises `CopyError` where an attempt at a part fails."""
        error = _failure(attempt, part)
        if error is None:
            return
        known_as = self._names_of_parts.get(name, name.removeprefix("_"))
        path, culprit = _culprit(attempt, known_as, part)
        lines = f"{type(error).__name__}: {error}".splitlines()
        raise CopyError(
            f"the {path} of a {type(self).__name__} ({type(culprit).__name__}) cannot be {verb} "
            f"({lines[0][:MESSAGE_LENGTH]}). {_advice(culprit)}"
        ) from error


def _is_cached(owner: object, name: str) -> bool:
    return isinstance(getattr(type(owner), name, None), cached_property)


def _state_of(reduced: Any) -> object:
    """The state in what ``__reduce_ex__`` returns."""
    return reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else None


def _parts(state: object) -> dict[str, object]:
    if isinstance(state, dict):
        return state
    return {} if state is None else {"state": state}


def _with_state(twin: _Object, state: Any) -> _Object:
    """A new object, given its state as `pickle` gives it."""
    if state is None:
        return twin
    if hasattr(twin, "__setstate__"):
        twin.__setstate__(state)
        return twin
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    vars(twin).update(attributes or {})
    for name, value in (slots or {}).items():
        object.__setattr__(twin, name, value)
    return twin


# --- trials ------------------------------------------------------------------------------


class _Nowhere:
    def write(self, data: bytes) -> int:
        return len(data)


class _Trial(pickle.Pickler):
    """Pickles to nowhere, without what takes long and what is tried on its own."""

    def persistent_id(self, value: object) -> object:
        is_array = isinstance(value, np.ndarray) and value.dtype != object
        return 0 if is_array or isinstance(value, (Tensor, Copyable)) else None


def _try_to_pickle(value: object) -> None:
    _Trial(_Nowhere(), pickle.HIGHEST_PROTOCOL).dump(value)


def _failure(attempt: _Attempt, value: object) -> Exception | None:
    try:
        attempt(value)
    except CopyError:
        raise
    except Exception as error:  # whatever an object says that was not made for it
        return error
    return None


def _culprit(attempt: _Attempt, path: str, value: object) -> tuple[str, object]:
    """The innermost part of a value that fails, and the way to it."""
    for _ in range(MAX_DEPTH):
        failing = ((p, v) for p, v in _inside(path, value) if _failure(attempt, v) is not None)
        found = next(failing, None)
        if found is None:
            break
        path, value = found
    return path, value


def _inside(path: str, value: object) -> Iterator[tuple[str, object]]:
    """The parts of a value, as one would write them."""
    if isinstance(value, dict):
        yield from ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"{path}[{number}]", item) for number, item in enumerate(value))
    elif isinstance(value, partial):
        yield from _inside(path, (value.func, *value.args))
        yield from ((f"{path}.{key}", item) for key, item in value.keywords.items())
    elif isinstance(value, nn.Module):
        yield from ((f"{path}.{name}", module) for name, module in value.named_children())
    if not isinstance(value, (FunctionType, type)):
        yield from ((f"{path}.{key}", v) for key, v in getattr(value, "__dict__", {}).items())


def _is_taken_by_value() -> bool:
    """Whether the pickler at work is one like cloudpickle, which takes functions by value."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if "cloudpickle" in name or name.partition(".")[0] == "dill":
            return True
        frame = frame.f_back
    return False


def _advice(culprit: object) -> str:
    is_named = isinstance(culprit, (FunctionType, type))
    if is_named or "<locals>" in type(culprit).__qualname__:
        it = "it" if is_named else "its class"
        return f"Define {it} at the top level of a module, where pickle finds it by its name"
    return (
        "Let the object that holds it leave it out by a __getstate__, or make what you copy anew "
        "where you need it"
    )
