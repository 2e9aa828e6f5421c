"""Examples as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import matplotlib as mpl

EXAMPLES = Path(__file__).parents[1] / "examples" / "programs"


def loaded(name: str) -> ModuleType:
    """An example by its name, executed but for what it does as a script; it draws to files."""
    mpl.use("Agg")
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where its dataclasses look for their annotations
    specification.loader.exec_module(module)
    return module
