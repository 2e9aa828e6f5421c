"""Are the tables of the migration pages complete?

Every public name of pyDVL's `pydvl.influence.torch`, of `dattri.func.hessian` and of curvlinops has
to be in the left column of a table of its page. ``nox -s migration`` reads the names from the
installed libraries, writes them to ``public_names.json`` beside this file and fails on one that is
missing; the tests hold the pages against that file.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
PAGES = HERE.parents[1] / "docs" / "migration"
RECORD = HERE / "public_names.json"

# Distribution and modules; the modules of a package that are not listed hold no public names.
PEERS = {
    "pydvl": (
        "pyDVL",
        (
            "pydvl.influence.torch",
            "pydvl.influence.torch.base",
            "pydvl.influence.torch.batch_operation",
            "pydvl.influence.torch.functional",
            "pydvl.influence.torch.influence_function_model",
            "pydvl.influence.torch.operator",
            "pydvl.influence.torch.preconditioner",
            "pydvl.influence.torch.util",
        ),
    ),
    "dattri": ("dattri", ("dattri.func.hessian",)),
    "curvlinops": ("curvlinops-for-pytorch", ("curvlinops",)),
}
CODE = re.compile(r"`([^`]+)`")


def names_of(module: ModuleType) -> set[str]:
    """The public names of a module: its `__all__`, or what it defines itself.

    A package without `__all__` has what it imports from its own modules.
    """
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return set(listed)
    is_package = hasattr(module, "__path__")
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and (
            getattr(value, "__module__", "").startswith(module.__name__)
            if is_package
            else getattr(value, "__module__", None) == module.__name__
        )
    }


def members_of(module: ModuleType) -> set[str]:
    """The public methods, properties and enumerated values of the public classes of a module."""
    family = module.__name__.partition(".")[0]
    classes = [getattr(module, name) for name in names_of(module)]
    return {
        member
        for cls in classes
        if inspect.isclass(cls)
        for base in cls.__mro__
        if base.__module__.partition(".")[0] == family
        for member in vars(base)
        if not member.startswith("_")
    }


def installed(peer: str) -> dict[str, object]:
    """The names of an installed library, and its version."""
    distribution, modules = PEERS[peer]
    names, members = set(), set()
    for path in modules:
        module = importlib.import_module(path)
        names |= names_of(module)
        members |= members_of(module)
    return {
        "version": version(distribution),
        "names": sorted(names),
        "members": sorted(members - names),
    }


def on_page(text: str) -> set[str]:
    """What the left columns of the tables of a page name: the last part of each dotted name."""
    named = set()
    for line in text.splitlines():
        if line.startswith("|"):
            left = line.split("|")[1]
            named |= {code.partition("(")[0].rpartition(".")[2] for code in CODE.findall(left)}
    return named


def missing(peer: str, public: dict[str, object]) -> list[str]:
    """The public names that no table of the page has on its left."""
    named = on_page((PAGES / f"{peer}.md").read_text("utf-8"))
    return sorted({*public["names"], *public["members"]} - named)


def main() -> int:
    """Record the names of the installed libraries; the number of those that are missing."""
    record = {peer: installed(peer) for peer in PEERS}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    absent = 0
    for peer, public in record.items():
        lacking = missing(peer, public)
        absent += len(lacking)
        found = f"{len(public['names'])} names and {len(public['members'])} members"
        print(f"{peer} {public['version']}: {found}, {len(lacking)} missing {lacking or ''}")
    return absent


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
