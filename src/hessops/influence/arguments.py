"""What the constructors of influence models share: historical keywords, and a memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from hessops.errors import ArgumentTypeError
from hessops.printed import described

_Constructor = TypeVar("_Constructor", bound=Callable[..., None])

# Keywords under which people know the arguments, as in pyDVL.
ALIASES: Mapping[str, str] = {
    "hessian_regularization": "regularization",
    "pre_conditioner": "preconditioner",
    "rank_estimate": "rank",
    "solve_simultaneously": "use_block_cg",
}
# Settings that change neither what is computed nor how.
SILENT = ("progress", "warn_on_max_iteration", "cache")


def recorded_constructor(
    constructor: _Constructor, parent: Callable[..., None] | None = None
) -> _Constructor:
    """A constructor that accepts the keywords of `ALIASES` and keeps its arguments.

    They are kept in ``_arguments``, defaults included; those of the subclass where constructors
    call each other.

    Args:
        constructor: Any ``__init__``.
        parent: That of the class which takes what is in the ``**kwargs`` of this one, whose
            keywords its signature then spells out.

    Raises:
        ArgumentTypeError: From the constructor: an argument is given under both of its names.
    """
    signature = inspect.signature(constructor)

    @wraps(constructor)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs = _renamed(signature, (self, *args), kwargs)
        if "_arguments" not in vars(self):
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError as error:
                raise ArgumentTypeError(f"{type(self).__name__}: {error}") from error
            bound.apply_defaults()
            self._arguments = _flat(signature, bound.arguments)
        constructor(self, *args, **kwargs)

    if parent is not None:
        construct.__signature__ = _spelled_out(signature, inspect.signature(parent))  # type: ignore[attr-defined]  # read by inspect
    return construct  # type: ignore[return-value]  # the same signature, by wraps


def _spelled_out(signature: inspect.Signature, parent: inspect.Signature) -> inspect.Signature:
    """A signature with the keywords of another in the place of its ``**kwargs``."""
    kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    if len(kept) == len(signature.parameters):
        return signature
    names = {parameter.name for parameter in kept}
    common = parent.parameters.values()
    added = [p for p in common if p.kind is p.KEYWORD_ONLY and p.name not in names]
    return signature.replace(parameters=[*kept, *added])


def _renamed(
    signature: inspect.Signature, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, object]:
    by_position = list(signature.parameters)[: len(args)]
    renamed: dict[str, object] = {}
    for key, value in kwargs.items():
        name = ALIASES.get(key, key)
        if name not in signature.parameters:
            name = key  # so that the error names what was given
        if name in renamed or (name != key and (name in by_position or name in kwargs)):
            raise ArgumentTypeError(
                f"{key!r} is another name of {name!r}, which is given too: pass one of them"
            )
        renamed[name] = value
    return renamed


def _flat(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, object]:
    """Arguments by name, without `self`, those in ``**kwargs`` among them."""
    flat: dict[str, object] = {}
    for name, value in list(arguments.items())[1:]:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            flat.update(value)
        else:
            flat[name] = value
    return flat


def changed_settings(model: object) -> list[str]:
    """The arguments beyond model and loss that are not the defaults, as ``name=value``."""
    parameters = inspect.signature(type(model).__init__).parameters
    return [
        f"{name}={described(value)}"
        for name, value in model._arguments.items()  # type: ignore[attr-defined]  # recorded above
        if name not in ("model", "loss")
        and (name not in parameters or parameters[name].default != value)
    ]


def recorded_settings(model: object) -> dict[str, object]:
    """The arguments beyond model and loss, defaults included."""
    arguments: Mapping[str, object] = model._arguments  # type: ignore[attr-defined]  # recorded above
    return {name: arguments[name] for name in arguments if name not in ("model", "loss")}
