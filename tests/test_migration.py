"""Scripts that were migrated from other libraries are right without them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "migration"
AFTER = sorted(FOLDER.glob("*/*_after.py"))
PAGES = Path(__file__).parents[1] / "docs" / "migration"


@pytest.fixture
def harness(monkeypatch):
    """The module that compares scripts; it imports no other library."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import side_by_side

    threads = torch.get_num_threads()
    yield side_by_side
    torch.set_num_threads(threads)  # the scripts take one
    # Some scripts change the model that they share, and other folders have such names, too.
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem.removesuffix('_after')}"


def with_its_group(script: Path) -> object:
    """Tests that start a cluster of dask share a process."""
    marks = [pytest.mark.xdist_group("dask")] if "dask" in script.stem else []
    return pytest.param(script, marks=marks, id=name_of(script))


# Torch says so itself, where torch.func.jvp is first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("script", [with_its_group(script) for script in AFTER])
def test_a_migrated_script_agrees_with_explicit_matrices(script, harness):
    after = harness.run_here(script)
    assert after.results
    assert after.differs.keys() | after.tolerances.keys() <= after.results.keys()
    reference = script.with_name(script.name.replace("_after", "_dense"))
    if not reference.exists():
        assert not after.differs  # nothing would decide who is right
        return
    dense = harness.run_here(reference)
    assert dense.results.keys() <= after.results.keys()
    assert after.differs.keys() <= dense.results.keys()
    for key, expected in dense.results.items():
        tolerance = after.tolerances.get(key, harness.REFERENCE_TOLERANCE)
        assert harness.distance(after.results[key], expected) <= tolerance, key


@pytest.mark.parametrize("script", AFTER, ids=name_of)
def test_a_migrated_script_has_one_that_it_comes_from(script):
    assert script.with_name(script.name.replace("_after", "_before")).exists()
    assert f"`{script.stem.removesuffix('_after')}`" in (
        PAGES / f"compared_{script.parent.name}.md"
    ).read_text("utf-8")


@pytest.mark.parametrize("library", sorted({script.parent.name for script in AFTER}))
def test_the_tables_of_a_page_have_every_public_name(library, harness):
    import public_names

    recorded = json.loads((FOLDER / "public_names.json").read_text("utf-8"))
    assert public_names.missing(library, recorded[library]) == []
