"""How the systems were solved: what stands out, and every right-hand side with its residual."""

from __future__ import annotations

from collections.abc import Mapping

from hessops.operators.solution import Solution, SolveStatus
from hessops.reporting.markup import (
    Html,
    count,
    element,
    foreign,
    joined,
    listed,
    measured,
    table,
)

# A residual that equals its tolerance was rounded when both were scaled back.
ROUNDING = 1 + 1e-9
# Rows of a table.
MOST_FAILED, MOST_CONVERGED = 200, 50


def is_met(solution: Solution, row: int) -> bool:
    """Whether a right-hand side is solved by its status and by its residual."""
    residual, tolerance = float(solution.residual_norms[row]), float(solution.tolerances[row])
    return solution.status[row] is SolveStatus.CONVERGED and residual <= tolerance * ROUNDING


def failed_rows(solution: Solution) -> list[int]:
    """The right-hand sides that did not meet their tolerance."""
    return [row for row in range(len(solution.status)) if not is_met(solution, row)]


def status_of(solution: Solution, row: int) -> str:
    """The status in words, which do not say more than the residual does."""
    status = solution.status[row]
    if status is SolveStatus.CONVERGED and not is_met(solution, row):
        return "said to have converged, residual above tolerance"
    return status.value


def of_block(name: str) -> str:
    """Which solves, in words; there is one without a name where the blocks are not told apart."""
    return f" of block {name!r}" if name else ""


def complaints(solutions: Mapping[str, Solution]) -> list[Html]:
    """What a reader must know first: right-hand sides by what became of them, with advice."""
    found = []
    for name, solution in solutions.items():
        by_status: dict[str, list[int]] = {}
        for row in failed_rows(solution):
            by_status.setdefault(status_of(solution, row), []).append(row)
        for status, rows in by_status.items():
            worst = float(solution.relative_residual_norms[rows].max())
            head = (
                f"{len(rows)} of {len(solution.status)} right-hand sides{of_block(name)}: {status}."
            )
            text = (
                f" True relative residual at most {measured(worst)}. Test points {listed(rows)}. "
                f"{_advice(solution, rows[0])}"
            )
            found.append(joined([element("strong", head), text]))
    return found


def _advice(solution: Solution, row: int) -> str:
    status = solution.status[row]
    return "Solve again." if status is SolveStatus.CONVERGED else status.advice


def outcomes_of(name: str, solution: Solution) -> list[Html]:
    """A sentence, and a table with those that failed first."""
    failed = failed_rows(solution)
    converged = sorted(set(range(len(solution.status))) - set(failed))
    shown = failed[:MOST_FAILED] + converged[:MOST_CONVERGED]
    most = int(solution.iterations.max()) if solution.status else 0
    parts = [
        element(
            "p",
            f"{len(converged)} of {count(len(solution.status), 'right-hand side')}{of_block(name)} "
            f"met the tolerance. At most {count(most, 'step')}; "
            f"{count(solution.num_applications, 'application')} of the operator, "
            f"{solution.num_preconditioner_applications:,} of the preconditioner, each to all at "
            "once.",
        )
    ]
    if solution.detail:
        parts.append(element("p", foreign(solution.detail)))
    parts.append(
        table(
            f"Right-hand sides{of_block(name)}; number i is the gradient of test point i",
            [
                "Test point",
                "Status",
                "Steps",
                "True residual ‖b − Ax‖",
                "Tolerance",
                "Residual ÷ tolerance",
                "‖b‖",
                "Relative residual",
            ],
            [_row(solution, row) for row in shown],
            row_classes=["failed" if row in set(failed) else None for row in shown],
        )
    )
    if len(shown) < len(solution.status):
        parts.append(element("p", _left_out(solution, failed, converged), class_="note"))
    return parts


def _row(solution: Solution, row: int) -> list[object]:
    residual, tolerance = float(solution.residual_norms[row]), float(solution.tolerances[row])
    met = is_met(solution, row)
    status = status_of(solution, row)
    ratio = "none" if tolerance == 0 else measured(residual / tolerance)
    return [
        row,
        status if met else element("span", status, class_="badge"),
        int(solution.iterations[row]),
        measured(residual),
        measured(tolerance),
        ratio,
        measured(float(solution.rhs_norms[row])),
        measured(float(solution.relative_residual_norms[row])),
    ]


def _left_out(solution: Solution, failed: list[int], converged: list[int]) -> str:
    """What the rows that are not shown are."""
    words = []
    more_failed, more_converged = failed[MOST_FAILED:], converged[MOST_CONVERGED:]
    for rows, outcome in ((more_failed, "did not meet"), (more_converged, "met")):
        if rows:
            worst = measured(float(solution.relative_residual_norms[rows].max()))
            words.append(
                f"{len(rows):,} more {outcome} the tolerance, relative residual at most {worst}."
            )
    return " ".join(words)
