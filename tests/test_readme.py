"""The README and the pages of the documentation say what is so: their code runs."""

from __future__ import annotations

import doctest
import inspect
import re
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import hessops

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts),
]

# A block of text that directly follows one of code is what the code prints.
FENCE = re.compile(
    r"^```(?P<language>[\w{}-]*)[^\n]*\n(?P<code>.*?)^```$"
    r"(?:\n+^```text\n(?P<output>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")

# In the paragraph above a block: which file of the package the block is.
MODULE_FILE = re.compile(r"`src/(hessops/[\w/]+)\.py`:\s*$")


def python_blocks(page: Path) -> list[tuple[int, str, str | None]]:
    """Return line numbers, texts and shown outputs of the blocks marked as python."""
    text = page.read_text("utf-8")
    return [
        (text.count("\n", 0, fence.start("code")), fence["code"], fence["output"])
        for fence in FENCE.finditer(text)
        if fence["language"] == "python"
    ]


def says_the_same(printed: str, shown: str) -> bool:
    """Compare as doctest does with an ellipsis, or up to what the machine does to numbers.

    These are a tenth, for numbers of steps or of random draws, and what is below 1e-6 is rounding.
    """
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if doctest.OutputChecker().check_output(shown, printed, options):
        return True
    if NUMBER.sub("#", printed).split() != NUMBER.sub("#", shown).split():
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    return all(float(a) == pytest.approx(float(b), rel=0.1, abs=1e-6) for a, b in pairs)


def test_outputs_are_compared_up_to_rounding():
    shown = "12 steps, residual 3.1e-09\nfloat64\n"
    assert says_the_same("13 steps,  residual 8.2e-08\nfloat64\n", shown)
    assert says_the_same("13 steps, residual 8.2e-08\nfloat64\n", "... steps, ...\nfloat64\n")
    assert not says_the_same("15 steps, residual 3.1e-09\nfloat64\n", shown)
    assert not says_the_same("12 steps, residual 3.1e-05\nfloat64\n", shown)
    assert not says_the_same("12 steps, residual 3.1e-09\nfloat32\n", shown)
    assert not says_the_same("12 steps, residual 3.1e-09\n", shown)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if python_blocks(page)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = page.read_text("utf-8").splitlines()
    namespace = {"__name__": page.stem}
    for lines_before, code, shown in python_blocks(page):
        # Padded, so that a traceback shows the line of the page.
        compiled = compile("\n" * lines_before + code, str(page), "exec")
        if goes_to := MODULE_FILE.search("\n".join(text[: lines_before - 1][-4:])):
            # A file of its own, which later blocks import from.
            module = ModuleType(goes_to[1].replace("/", "."))
            monkeypatch.setitem(sys.modules, module.__name__, module)
            exec(compiled, module.__dict__)
        else:
            exec(compiled, namespace)
        printed = capsys.readouterr().out
        if shown is not None:
            assert says_the_same(printed, shown), f"line {lines_before} prints\n{printed}"
    for name, value in namespace.items():
        if name.startswith("test_") and inspect.isfunction(value):
            value()


def test_the_readme_has_an_example():
    assert python_blocks(ROOT / "README.md")


def test_the_sessions_named_by_the_readme_and_the_ci_script_exist():
    defined = set(re.findall(r"^@nox\.session\ndef (\w+)", (ROOT / "noxfile.py").read_text(), re.M))
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run"):
        named = set(re.findall(r"nox -s (\w+)", document.read_text("utf-8")))
        assert named, document
        assert named <= defined, document


# What programs import from, the outermost first.
PUBLIC_MODULES = (
    "hessops",
    "hessops.functional",
    "hessops.batch",
    "hessops.operators",
    "hessops.solvers",
    "hessops.estimators",
    "hessops.influence",
    "hessops.ihvp",
    "hessops.distributed",
    "hessops.plotting",
    "hessops.reporting",
    "hessops.testing",
    "hessops.errors",
)
ENTRY = re.compile(
    r"^\.\. (?:auto(?:class|function|exception)|function|py:class):: (?P<name>hessops\S+)", re.M
)


def public_names(module: ModuleType) -> list[str]:
    """Return `__all__`, or the classes that a module without it defines, less modules."""
    defined = [name for name, value in vars(module).items() if inspect.isclass(value)]
    names = getattr(module, "__all__", None) or defined
    return [
        name
        for name in names
        if not name.startswith("__") and not inspect.ismodule(getattr(module, name))
    ]


def test_every_public_name_has_one_entry_in_the_api_reference():
    entries = Counter(
        name
        for page in (DOCS / "api").glob("*.md")
        for name in ENTRY.findall(page.read_text("utf-8"))
    )
    for module in map(import_module, PUBLIC_MODULES):
        for name in public_names(module):
            value = getattr(module, name)
            # A name that several modules have stands under one of them.
            places = [
                place
                for place in PUBLIC_MODULES
                if getattr(import_module(place), name, None) is value
            ]
            count = sum(entries[f"{place}.{name}"] for place in places)
            assert count == 1, f"{module.__name__}.{name} has {count} entries"


def test_the_table_of_the_api_reference_lists_every_entry_once():
    pages = {page.stem: page.read_text("utf-8") for page in (DOCS / "api").glob("*.md")}
    index = pages.pop("index")
    table = {}
    for section in re.split(r"^## ", index, flags=re.M)[1:]:
        page = re.search(r"\((\w+)\.md\)", section)[1]
        table[page] = re.findall(r"^   ~(\S+)$", section, re.M)
    assert table == {stem: ENTRY.findall(text) for stem, text in pages.items()}


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    (version,) = re.findall(r"^version: (.+)$", citation, re.M)
    assert version == hessops.__version__
    (licence,) = re.findall(r'^license = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert f"\nlicense: {licence}\n" in citation
