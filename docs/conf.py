"""Configuration of the documentation, built by ``nox -s docs``."""

from __future__ import annotations

import os
import re
import sys
from abc import ABC
from pathlib import Path

import hessops
from hessops.copies import Copyable
from hessops.printed import Printed

os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "hessops"
author = "the hessops authors"
copyright = "the hessops authors"
version = release = hessops.__version__

extensions = [
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "migration/compared_*.md"]  # the latter are parts of pages
# sphinx-gallery leaves copies of the programs beside their pages.
for _gallery in ("gallery", "recipes", "start"):
    exclude_patterns += [f"{_gallery}/**/*.ipynb", f"{_gallery}/**/*.py"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["hessops.css"]
html_math_renderer = "mathml"
html_title = f"hessops {release}"

# Names in single backquotes are code; references are written as :class:`...`.
default_role = "code"
nitpicky = True

# What code printed, right below it, is not for copying.
copybutton_selector = ":not(.highlight-python + .highlight-text) > div.highlight pre"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autosummary_generate = False  # its tables of one line for each name, without pages of their own
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": ["../examples/programs", "../examples/recipes", "../examples/start"],
    "gallery_dirs": ["gallery", "recipes", "start"],
    "within_subsection_order": "gallery_order.by_reading",
    "filename_pattern": r"\.py$",
    "nested_sections": False,
    "only_warn_on_example_error": False,
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "write_computation_times": False,
    "thumbnail_size": (400, 280),
    "default_thumb_file": str(Path(__file__).parent / "_static" / "thumbnail.svg"),
}

# There is no network in the build, so names of other projects have nowhere to lead.
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(_pickle|abc|collections|contextlib|enum|matplotlib|numpy|pathlib|scipy|torch|tqdm"
        r"|typing)(\..*)?",
    ),
    # In signatures: type variables, protocols and what only type checkers import.
    (r"py:class", r"hessops\.(\w+\.)+(_\w+|AppliesToRows|ArrayConverter|Density|FactorSource)"),
    (r"py:class", r"hessops\.(\w+\.)+(Operator|OrderedBatches|Pairs|PointGradients|Processes)"),
    (r"py:class", r"hessops\.(\w+\.)+(Rows|SlicedArray|Structure|Summand)"),
    (r"py:class", r"DTypeLike|DaskArray|Dataset|Description|LinearOperator|RawUnpack|Reduction"),
]


def _show_public_bases_only(app, name, obj, options, bases):
    hidden = (ABC, Copyable, Printed)  # what classes share, and no reader needs
    bases[:] = [b for b in bases if not b.__name__.startswith("_") and b not in hidden] or [object]


def _keep_first_line_of_property(app, what, name, obj, options, lines):
    # Napoleon takes "words: more words" at the start of a property for its type, so start it with
    # something else: an escaped space, which shows as nothing.
    if what == "property":
        lines.insert(0, "\\ ")


def _keep_single_letters(app, what, name, obj, options, lines):
    # "operator: A." is a list of one empty item to docutils, unless the letter is escaped.
    lines[:] = [re.sub(r"^( +\w+: )([A-Za-z]\.( |$))", r"\1\\\2", line) for line in lines]


def setup(app):
    """Connect the hooks above; those of docstrings come before napoleon."""
    app.connect("autodoc-process-bases", _show_public_bases_only)
    app.connect("autodoc-process-docstring", _keep_first_line_of_property, priority=400)
    app.connect("autodoc-process-docstring", _keep_single_letters, priority=400)
