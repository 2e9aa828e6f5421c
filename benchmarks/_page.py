"""The page docs/benchmarks.md, from what the families of benchmarks have written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "benchmarks.md"
FAMILIES = ("products", "solves", "low_rank", "kronecker", "scores", "memory")

HEAD = """\
# Benchmarks

What `hessops` costs beside other libraries that do the same work, measured side by side in one run:

```text
nox -s bench                        # every family; writes this page
nox -s bench -- products            # one of them
nox -s bench -- products --quick    # a short form, which writes to benchmarks/out
```

Times are in units of **one full-batch gradient**: `torch.autograd.grad` of the mean loss of all
data, which are in memory already. In a round everyone is measured once, directly after the unit;
the tables have medians over several rounds of the ratios within a round. Everyone has the same
model, the same data, float32 and the same number of threads. Other libraries get the settings that
suit them best: each is tried with the batches of `hessops` and with all data in one batch, where
memory permits, and is measured with the faster.

Every answer is compared with a reference. One that is not right is marked `(wrong: ...)` with its
error beside the time, and `fails: ...` names the exception of a library that gives no answer. A
dash is for what a library does not have.
"""

EMPTY = "\nNothing has been measured yet: `nox -s bench` fills this page.\n"


@dataclass
class Table:
    """Cells for readers.

    Attributes:
        title: What stands above.
        header: Of the columns; the first is the name of a row.
        rows: Cells.
    """

    title: str
    header: list[str]
    rows: list[list[str]]

    def lines(self) -> Iterator[str]:
        """Markdown."""
        yield f"**{self.title}**"
        yield ""
        yield _line(self.header)
        yield _line([":--", *["--:"] * (len(self.header) - 1)])
        for row in self.rows:
            yield _line(row)
        yield ""


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write(folder: Path, page: Path) -> None:
    """Writes the page.

    Args:
        folder: Where the families have written to.
        page: What is written.
    """
    paths = [folder / f"{family}.json" for family in FAMILIES]
    found = [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]
    lines = [HEAD]
    for content in found:
        lines += _section(content)
    page.write_text("\n".join(lines).rstrip() + "\n" + ("" if found else EMPTY), "utf-8")


def _section(content: Mapping[str, object]) -> Iterator[str]:
    yield f"## {content['title']}"
    yield ""
    yield str(content["description"])
    yield ""
    tables = content["tables"]
    assert isinstance(tables, list)
    for table in tables:
        yield from Table(**table).lines()
    if content["left_out"]:
        yield f"Not installed, and left out: {', '.join(map(str, content['left_out']))}."
        yield ""
    yield _where(content["machine"], content["family"])
    yield ""


def _where(machine: object, family: object) -> str:
    assert isinstance(machine, dict)
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"Measured on {machine['date']}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['memory_gib']} GiB, {machine['system']}; "
        f"Python {machine['python']}, {versions}. `benchmarks/{family}.py`, all numbers in "
        f"`benchmarks/results/{family}.json`."
    )


if __name__ == "__main__":
    write(RESULTS, PAGE)
