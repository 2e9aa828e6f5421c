"""The page of guarantees names tests and errors that exist."""

from __future__ import annotations

import ast
import builtins
import re
from functools import cache
from pathlib import Path

from hessops import errors

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guarantees.md").read_text("utf-8")
NAMED_TEST = re.compile(r"\b(tests/\w+\.py)::(\w+)")
SECTION = re.compile(r"^### (?P<title>[^\n]*)\n(?P<text>.*?)(?=^##|\Z)", re.M | re.S)


@cache
def functions_of(path: str) -> set[str]:
    """Return the names of all functions that a file defines, without running it."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_named_exists():
    named = set(NAMED_TEST.findall(PAGE))
    assert len(named) > 100
    missing = [
        f"{path}::{name}"
        for path, name in sorted(named)
        if not (ROOT / path).exists() or name not in functions_of(path)
    ]
    assert missing == []


def test_every_guarantee_has_a_scope_and_names_tests():
    guarantees = PAGE.split("## What is guaranteed\n")[1].split("\n## ")[0]
    sections = list(SECTION.finditer(guarantees))
    assert len(sections) >= 10
    for section in sections:
        assert "**Scope.**" in section["text"], section["title"]
        assert NAMED_TEST.search(section["text"]), section["title"]


def test_every_error_and_warning_that_is_named_exists():
    named = set(re.findall(r"\b[A-Z]\w*(?:Error|Warning)\b", PAGE))
    assert len(named) >= 10
    assert [n for n in sorted(named) if not hasattr(errors, n) and not hasattr(builtins, n)] == []
