"""The README and the pages of the documentation say what is so: their code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hessops
from hessops import influence

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts),
]

FENCE = re.compile(r"^```(?P<language>[\w{}-]*)[^\n]*\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Return the line numbers and the texts of the blocks marked as python."""
    text = page.read_text("utf-8")
    return [
        (text.count("\n", 0, fence.start("code")), fence["code"])
        for fence in FENCE.finditer(text)
        if fence["language"] == "python"
    ]


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if python_blocks(page)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for lines_before, code in python_blocks(page):
        # Padded, so that a traceback shows the line of the page.
        exec(compile("\n" * lines_before + code, str(page), "exec"), namespace)
    for name, shown in namespace.items():
        if name.startswith("test_"):
            shown()


def test_the_readme_has_an_example():
    assert python_blocks(ROOT / "README.md")


def test_the_sessions_named_by_the_readme_and_the_ci_script_exist():
    defined = set(re.findall(r"^@nox\.session\ndef (\w+)", (ROOT / "noxfile.py").read_text(), re.M))
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run"):
        named = set(re.findall(r"nox -s (\w+)", document.read_text("utf-8")))
        assert named, document
        assert named <= defined, document


def test_every_public_name_has_an_entry_in_the_api_reference():
    reference = (ROOT / "docs" / "api.md").read_text("utf-8")
    entry = r"^\.\. (?:auto\w+|function|py:class):: hessops\.(\w+)"
    documented = set(re.findall(entry, reference, re.M))
    assert set(hessops.__all__) - {"__version__"} <= documented
    of_influence = r"^\.\. auto\w+:: hessops\.influence\.(\w+)"
    assert set(influence.__all__) == set(re.findall(of_influence, reference, re.M))


def test_the_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    (version,) = re.findall(r"^version: (.+)$", citation, re.M)
    assert version == hessops.__version__
    (licence,) = re.findall(r'^license = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert f"\nlicense: {licence}\n" in citation
