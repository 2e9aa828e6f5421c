"""The same work before and after a migration, number by number.

Each pair of scripts, ``<library>/<topic>_before.py`` and ``<library>/<topic>_after.py``, ends with
a dictionary ``results`` of equal keys. Both are run, each in a process of its own, beside
``<topic>_dense.py`` where there is one: an independent reference from explicit matrices. A number
must be equal before and after, to ``TOLERANCE`` or what ``tolerances`` of the script after says, or
be listed there in ``differs`` with the reason; then the reference decides which is right, and it
must be the one after. ``nox -s migration`` runs this where the other libraries are installed, and
writes the tables of the pages.
"""

from __future__ import annotations

import argparse
import pickle
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from public_names import PAGES, PEERS

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-6
REFERENCE_TOLERANCE = 1e-8
ROUNDING = 1e-12


@dataclass(frozen=True)
class Outcome:
    """What a script found, and what it says of it."""

    results: dict[str, np.ndarray]
    differs: dict[str, str]
    tolerances: dict[str, float]


def run_here(script: Path) -> Outcome:
    """Run a script in this process and keep its numbers."""
    sys.path.insert(0, str(HERE))  # where the scripts find `setting`
    names = runpy.run_path(str(script), run_name="__main__")
    results = {key: np.asarray(value, dtype=np.float64) for key, value in names["results"].items()}
    return Outcome(results, names.get("differs", {}), names.get("tolerances", {}))


def run(script: Path) -> Outcome:
    """Run a script in a process of its own: some libraries change settings of others."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "outcome.pickle"
        command = [sys.executable, "-W", "ignore", __file__, "--alone", str(script), str(kept)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{script.name} failed:\n{done.stdout}{done.stderr}")
        # Written a moment ago by this very script.
        return pickle.loads(kept.read_bytes())


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The norm of the difference relative to that of `other`; infinite for a shape or a NaN."""
    if one.shape != other.shape:
        return float("inf")
    scale = float(np.linalg.norm(other)) or 1.0
    found = float(np.linalg.norm(one - other)) / scale
    return found if np.isfinite(found) else float("inf")


@dataclass(frozen=True)
class Row:
    """One number before, after and by the reference."""

    topic: str
    key: str
    apart: float
    before: float | None
    after: float | None
    verdict: str
    is_fine: bool

    def __str__(self) -> str:
        """The row of a table."""
        return (
            f"| `{self.topic}` | {self.key} | {_shown(self.apart)} | {_shown(self.before)} "
            f"| {_shown(self.after)} | {self.verdict} |"
        )


def _shown(number: float | None) -> str:
    if number is None:
        return "–"
    if np.isinf(number):
        return "another shape or NaN"
    # Digits of rounding are other ones on every machine.
    return f"{number:.0e}" if number > ROUNDING else f"< {ROUNDING:.0e}"


def compared(topic: str, before: Outcome, after: Outcome, dense: Outcome | None) -> list[Row]:
    """Judge every number of a pair of scripts."""
    if before.results.keys() != after.results.keys():
        raise ValueError(f"{topic}: before {list(before.results)}, after {list(after.results)}")
    return [_judged(topic, key, before, after, dense) for key in before.results]


def _judged(topic: str, key: str, before: Outcome, after: Outcome, dense: Outcome | None) -> Row:
    tolerance = after.tolerances.get(key, TOLERANCE)
    apart = distance(before.results[key], after.results[key])
    errors: tuple[float | None, float | None] = (None, None)
    if dense is not None and key in dense.results:
        reference = dense.results[key]
        errors = distance(before.results[key], reference), distance(after.results[key], reference)
    is_right = errors[1] is None or errors[1] <= after.tolerances.get(key, REFERENCE_TOLERANCE)
    if key in after.differs:
        decided = errors[0] is not None and errors[0] > tolerance
        verdict = f"after is right: {after.differs[key]}"
        return Row(topic, key, apart, *errors, verdict, decided and is_right)
    return Row(topic, key, apart, *errors, "equal", apart <= tolerance and is_right)


def pairs(peer: str) -> list[str]:
    """The topics of a library that have scripts."""
    ends = "_before.py"
    return sorted(path.name.removesuffix(ends) for path in (HERE / peer).glob(f"*{ends}"))


def table(rows: list[Row], peer: str) -> str:
    """The rows as a table of a page."""
    name = PEERS[peer][0]
    columns = ("Script", "Number", f"{name} from `hessops`", f"{name} from dense")
    head = f"| {' | '.join((*columns, '`hessops` from dense', 'Verdict'))} |"
    return "\n".join([head, "|---|---|---|---|---|---|", *map(str, rows)]) + "\n"


def compare(peer: str) -> list[Row]:
    """Run all scripts of a library and write its table."""
    rows = []
    for topic in pairs(peer):
        scripts = [HERE / peer / f"{topic}_{which}.py" for which in ("before", "after", "dense")]
        outcomes = [run(script) if script.exists() else None for script in scripts]
        rows += compared(topic, *outcomes)
    text = table(rows, peer)
    (PAGES / f"compared_{peer}.md").write_text(text, "utf-8")
    print(text)
    return rows


def main() -> int:
    """Compare all pairs; the number of numbers that are not as they should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", nargs="*", help="libraries, all unless named")
    parser.add_argument("--alone", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        script, kept = arguments.alone
        outcome = run_here(script)
        kept.write_bytes(pickle.dumps(outcome))
        return 0
    rows = [row for peer in arguments.peers or PEERS for row in compare(peer)]
    wrong = [f"{row.topic}: {row.key}" for row in rows if not row.is_fine]
    print(f"{len(rows)} numbers compared, {len(wrong)} not as they should be {wrong or ''}")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
