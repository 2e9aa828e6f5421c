"""Configuration of the documentation, built by ``nox -s docs``."""

from __future__ import annotations

import os
from abc import ABC

import hessops
from hessops.copies import Copyable
from hessops.printed import Printed

os.environ.setdefault("MPLBACKEND", "Agg")

project = "hessops"
author = "the hessops authors"
copyright = "the hessops authors"
version = release = hessops.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
# sphinx-gallery leaves copies of the programs beside their pages.
exclude_patterns += ["gallery/**/*.ipynb", "gallery/**/*.py"]

html_theme = "furo"
html_title = f"hessops {release}"

# Names in single backquotes are code; references are written as :class:`...`.
default_role = "code"
nitpicky = True

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": ["../examples"],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"examples[/\\][^/\\]+\.py$",
    "nested_sections": False,
    "only_warn_on_example_error": False,
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "write_computation_times": False,
}

# There is no network in the build, so names of other projects have nowhere to lead.
nitpick_ignore_regex = [
    (r"py:.*", r"(_pickle|abc|collections|enum|numpy|scipy|torch|tqdm|typing)(\..*)?")
]


def _show_public_bases_only(app, name, obj, options, bases):
    hidden = (ABC, Copyable, Printed)  # what classes share, and no reader needs
    bases[:] = [b for b in bases if not b.__name__.startswith("_") and b not in hidden] or [object]


def _keep_first_line_of_property(app, what, name, obj, options, lines):
    # Napoleon takes "words: more words" at the start of a property for its type, so start it with
    # something else: an escaped space, which shows as nothing.
    if what == "property":
        lines.insert(0, "\\ ")


def setup(app):
    """Connect the hooks above; the second one comes before napoleon."""
    app.connect("autodoc-process-bases", _show_public_bases_only)
    app.connect("autodoc-process-docstring", _keep_first_line_of_property, priority=400)
