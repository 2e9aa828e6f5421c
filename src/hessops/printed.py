"""How objects print themselves: one tree, as text at a prompt and as HTML in notebooks."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from itertools import islice
from textwrap import wrap
from typing import TypeVar

import torch
from torch import Tensor, nn

_Item = TypeVar("_Item")

# Columns of a line of text.
WIDTH = 100
# Of more parts than this the first and the last ones are printed.
MOST_PARTS, FIRST_PARTS, LAST_PARTS = 12, 8, 2
MOST_LEVELS, MOST_NODES = 8, 100
# Levels that a notebook shows before anything is clicked.
OPEN_LEVELS = 3
# Entries of a collection, and characters of a foreign repr.
MOST_ENTRIES, MOST_CHARACTERS = 4, 60


@dataclass(frozen=True, eq=False)
class Node:
    """An object in a printed tree.

    Attributes:
        label: What it is; a long one is broken behind its commas.
        note: Its size, dtype and device, which are printed in brackets.
        parts: What it is made of; it is asked for its own node when it is printed.
        details: What only notebooks show, and only when it is clicked.
        of: The object itself: one that is part of the tree twice is spelled out once.
    """

    label: str
    note: str = ""
    parts: Sequence[Node | Printed] = ()
    details: Sequence[str] = ()
    of: object = None


class Printed:
    """An object that prints itself by its node, as text and as HTML."""

    def _node(self) -> Node:
        """The hook: what is printed."""
        return Node(f"{type(self).__name__}()")

    def __repr__(self) -> str:
        return as_text(self._node())

    def _repr_html_(self) -> str:
        # A subclass that says something else of itself, such as a dataclass, is taken at its word.
        own_words = type(self).__repr__ is not Printed.__repr__
        return as_html(Node(repr(self)) if own_words else self._node())


def named(role: str, part: Printed) -> Node:
    """The node of a part, with what it is there for."""
    node = part._node()
    return replace(node, label=f"{role}={node.label}")


def settings_of(instance: object, *names: str) -> str:
    """The name of a class and some attributes of its instance, without those that are ``None``."""
    values = ((name, getattr(instance, name)) for name in names)
    given = [f"{name}={described(value)}" for name, value in values if value is not None]
    return f"{type(instance).__name__.lstrip('_')}({', '.join(given)})"


# --- what is printed of a tree -----------------------------------------------------------


@dataclass(frozen=True)
class _Branch:
    """A node that is printed, with those below it that are."""

    label: str
    note: str = ""
    branches: Sequence[_Branch] = ()
    details: Sequence[str] = ()

    @property
    def text(self) -> str:
        return f"{self.label} [{self.note}]" if self.note else self.label


@dataclass
class _Pruning:
    """What was printed so far, which decides what else is."""

    num_nodes: int = 0
    # Kept with the object, so that no other one can have its address meanwhile.
    seen: dict[int, object] = field(default_factory=dict)

    def branch(self, node: Node, level: int = 0) -> _Branch:
        self.num_nodes += 1
        if node.parts and id(node.of) in self.seen:
            return _Branch(node.label, note=node.note, branches=[_Branch("… (as above)")])
        if node.of is not None:
            self.seen[id(node.of)] = node.of
        return _Branch(node.label, node.note, list(self._below(node, level)), node.details)

    def _below(self, node: Node, level: int) -> Iterator[_Branch]:
        count = len(node.parts)
        if count and level == MOST_LEVELS:
            yield _Branch("… (deeper parts are not shown)")
            return
        left_out = range(FIRST_PARTS, count - LAST_PARTS) if count > MOST_PARTS else range(0)
        for number, part in enumerate(node.parts):
            if self.num_nodes >= MOST_NODES:
                yield _Branch(f"… {count - number} more")
                return
            if number not in left_out:
                child = part._node() if isinstance(part, Printed) else part
                yield self.branch(child, level + 1)
            elif number == left_out.start:
                yield _Branch(f"… {len(left_out)} more")


# --- text --------------------------------------------------------------------------------


def as_text(node: Node) -> str:
    """A node and what is below it, in lines of at most 100 columns."""
    return "\n".join(_lines(_Pruning().branch(node), "", ""))


def _lines(branch: _Branch, before: str, below: str) -> Iterator[str]:
    """The lines of a branch; `before` precedes its first one and `below` the others."""
    first, *rest = _broken(branch, WIDTH - len(below) - 3)
    yield before + first
    trunk = "│  " if branch.branches else "   "
    yield from (f"{below}{trunk}{line}" for line in rest)
    for number, child in enumerate(branch.branches, start=1):
        is_last = number == len(branch.branches)
        yield from _lines(
            child, below + ("└─ " if is_last else "├─ "), below + ("   " if is_last else "│  ")
        )


def _broken(branch: _Branch, width: int) -> list[str]:
    """A label in lines: broken behind commas, else between words, else anywhere."""
    pieces = re.split(r"(?<=,) ", " ".join(branch.label.split()))
    lines = [""]
    for piece in pieces:
        joined = f"{lines[-1]} {piece}".strip()
        if len(joined) <= width + (3 if len(lines) == 1 else 0):
            lines[-1] = joined
        else:
            lines += wrap(piece, width, break_on_hyphens=False)
    note = f"[{branch.note}]" if branch.note else ""
    whole = f"{lines[-1]} {note}".strip()
    if len(whole) <= width + (3 if len(lines) == 1 else 0):
        lines[-1] = whole
    else:
        lines.append(note)
    return [line for line in lines if line] or [""]


# --- HTML --------------------------------------------------------------------------------


def as_html(node: Node) -> str:
    """The same tree as nested ``<details>``, with no script and no colours of its own."""
    return (
        '<div style="font-family:monospace;font-size:inherit;line-height:1.5;overflow-x:auto">'
        f"{_element(_Pruning().branch(node), 0)}</div>"
    )


def _element(branch: _Branch, level: int) -> str:
    head = html.escape(branch.label)
    if branch.note:
        head += f' <span style="opacity:0.6">[{html.escape(branch.note)}]</span>'
    below = [_element(child, level + 1) for child in branch.branches]
    below += [f"<div>{html.escape(line)}</div>" for line in branch.details]
    if not below:
        return f"<div>{head}</div>"
    is_open = " open" if branch.branches and level < OPEN_LEVELS else ""
    inside = f'<div style="margin-left:1.5em">{"".join(below)}</div>'
    summary = f'<summary style="cursor:pointer">{head}</summary>'
    return f"<details{is_open}>{summary}{inside}</details>"


# --- values ------------------------------------------------------------------------------


def described(value: object) -> str:
    """A setting in a few words: no entries of tensors, no addresses, no foreign lines.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from hessops.printed import described
        >>> described(torch.zeros(1000, 2)), described(partial(max, key=len))
        ('tensor (1000, 2)', 'partial(max, key=len)')
        >>> described({"a": 0.5, "b": lambda x: x}), described(list(range(1000)))
        ("{'a': 0.5, 'b': a lambda}", '[0, 1, 2, 3, … 996 more]')
    """
    if isinstance(value, Enum):
        return repr(value.value)
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    if isinstance(value, Printed) and type(value).__repr__ is Printed.__repr__:
        return value._node().label
    if isinstance(value, torch.Generator):
        return f"Generator on {value.device}"
    if isinstance(value, Mapping):
        entries = [f"{described(key)}: {described(item)}" for key, item in _some(value.items())]
        return f"{{{_listed(entries, len(value))}}}"
    if isinstance(value, (list, tuple)):
        entries = [described(item) for item in _some(value)]
        listed = _listed(entries, len(value))
        return f"[{listed}]" if isinstance(value, list) else f"({listed})"
    if isinstance(value, (nn.Module, partial, type)) or callable(value):
        return name_of(value)
    return _clipped(value)


def name_of(function: object) -> str:
    """The name of a function, a module, a class or an object, as a reader knows it."""
    if isinstance(function, partial):
        given = [described(item) for item in function.args]
        given += [f"{key}={described(item)}" for key, item in function.keywords.items()]
        return f"partial({', '.join([name_of(function.func), *given])})"
    name = getattr(function, "__name__", None)
    if not isinstance(name, str):
        return type(function).__name__
    return "a lambda" if name == "<lambda>" else name


def size_of(tensor: Tensor) -> str:
    """Shape, dtype and device of a tensor, as a note."""
    shape = " x ".join(map(str, tensor.shape)) or "()"
    return f"{shape}, {short_dtype(tensor.dtype)}, {tensor.device}"


def short_dtype(dtype: torch.dtype) -> str:
    """A dtype without the name of the package."""
    return str(dtype).removeprefix("torch.")


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number of things, in English."""
    return f"{count} {noun}" if count == 1 else f"{count} {plural or noun + 's'}"


def _some(entries: Iterable[_Item]) -> Iterator[_Item]:
    return islice(entries, MOST_ENTRIES)


def _listed(entries: Sequence[str], count: int) -> str:
    left_out = count - len(entries)
    return ", ".join([*entries, f"… {left_out} more"] if left_out else entries)


def _clipped(value: object) -> str:
    text = " ".join(repr(value).split())
    if " at 0x" in text:
        return f"{type(value).__name__}()"
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"
