"""Several solves of one system beside each other: by steps and by what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from hessops.errors import ArgumentError, ArgumentTypeError, ShapeError
from hessops.operators.solution import Solution
from hessops.plotting.arguments import Floats
from hessops.plotting.canvas import axes_or_new, new_column
from hessops.plotting.residuals import Course, checked_solutions, courses_of, draw_end, finish
from hessops.plotting.style import Pen, pen
from hessops.validation import checked_count

FIGURE_SIZE = (5.6, 6.6)
# Right-hand sides of one system in several dtypes have norms that differ by rounding.
SAME_NORM = 1e-2


def preconditioner_comparison(
    solutions: Mapping[str, Solution],
    axes: Sequence[Axes] | None = None,
    *,
    setup: Mapping[str, int] | None = None,
    relative: bool = True,
) -> tuple[Axes, Axes]:
    """Draws several solves of one system twice: against steps, and against applications of A.

    A line is the largest residual among the right-hand sides, a band reaches down to the smallest,
    and a dot marks the largest true residual of what was returned: filled where all met their
    tolerances. A right-hand side that is finished keeps its last residual.

    An application is one pass over the data for all right-hand sides. A `Solution` counts those of
    the solve: one for each step and some that measure true residuals, which are spread evenly over
    the steps here; the end of each line is exact. It does not count what fitting a preconditioner
    took, so `setup` has to say it; the line starts there.

    Args:
        solutions: Label -> what ``solve(rhs, history=True)`` returned, all for one `rhs`.
        axes: Where to draw, two of them; ``None`` makes a figure with one below the other.
        setup: Label -> applications of A before the solve, such as 1 for a Nyström or a Jacobi
            preconditioner that is fitted to A; 0 for labels that are not in it.
        relative: Divides by ‖b‖.

    Returns:
        The two axes.

    Raises:
        ArgumentTypeError: `solutions`, `axes` or `setup` is something else.
        ArgumentError: A solution without a history, none at all, right-hand sides that differ, or
            a set-up that is negative or of an unknown label.
        ShapeError: Another number of axes than two.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("agg")
        >>> import torch
        >>> from hessops import CgOperator, DiagonalOperator, NystroemPreconditioner
        >>> from hessops.plotting import preconditioner_comparison
        >>> A = DiagonalOperator(torch.arange(1.0, 50.0))
        >>> sketched = CgOperator(A, 0.1, preconditioner=NystroemPreconditioner(rank=20))
        >>> solutions = {
        ...     "none": CgOperator(A, 0.1).solve(torch.ones(49), history=True),
        ...     "Nyström": sketched.solve(torch.ones(49), history=True),
        ... }
        >>> by_step, by_cost = preconditioner_comparison(solutions, setup={"Nyström": 1})
        >>> by_cost.get_xlabel()
        'applications of A, with set-up'
    """
    if not isinstance(solutions, Mapping):
        raise ArgumentTypeError(
            f"solutions must be a mapping from labels, got {type(solutions).__name__}"
        )
    named = checked_solutions(solutions)
    _require_one_system(named)
    costs = _checked_setup(setup, named)
    by_step, by_cost = _two_axes(axes)
    courses = {label: courses_of(one, relative) for label, one in named.items()}
    for panel in (by_step, by_cost):
        panel.set_yscale("log", nonpositive="clip")
    for position, (label, some) in enumerate(courses.items()):
        if some:
            span = _Span.of(some)
            steps = np.arange(len(span.worst), dtype=np.float64)
            _draw_span(by_step, steps, span, label, pen(position))
            applications = _applications(named[label], steps) + costs[label]
            _draw_span(by_cost, applications, span, label, pen(position))
    for panel in (by_step, by_cost):
        finish(panel, courses, relative)
    legend = by_cost.get_legend()
    if legend is not None:
        legend.remove()  # that of the other panel serves both
    by_step.set_xlabel("step")
    by_cost.set_xlabel("applications of A, with set-up" if setup else "applications of A")
    return by_step, by_cost


@dataclass(frozen=True)
class _Span:
    """The residuals of several right-hand sides, by step ``(s,)``, and how the worst one ended."""

    worst: Floats
    best: Floats
    end: float
    met: bool

    @classmethod
    def of(cls, courses: list[Course]) -> _Span:
        longest = max(len(course.norms) for course in courses)
        rows = [
            np.pad(course.norms, (0, longest - len(course.norms)), mode="edge")
            for course in courses
        ]
        # With a NaN, of a recurrence that overflowed, the worst is unknown and not drawn.
        return cls(
            np.max(rows, axis=0),
            np.min(rows, axis=0),
            max(course.end for course in courses),
            all(course.met for course in courses),
        )


def _draw_span(axes: Axes, x: Floats, span: _Span, label: str, style: Pen) -> None:
    axes.fill_between(x, span.best, span.worst, color=style.color, alpha=0.15, linewidth=0)
    axes.plot(x, span.worst, color=style.color, linestyle=style.dashes, linewidth=1.6, label=label)
    draw_end(axes, float(x[-1]), span.end, style.color, met=span.met)


def _applications(solution: Solution, steps: Floats) -> Floats:
    """Applications after each step, of which the solve reports only the sum."""
    if steps[-1] == 0:
        return np.full(len(steps), float(solution.num_applications))
    applications: Floats = steps * (solution.num_applications / steps[-1])
    return applications


def _require_one_system(named: Mapping[str, Solution]) -> None:
    label, first = next(iter(named.items()))
    norms = first.rhs_norms.cpu()
    for other, solution in named.items():
        theirs = solution.rhs_norms.cpu()
        if theirs.shape != norms.shape or not bool(
            ((theirs - norms).abs() <= SAME_NORM * norms).all()
        ):
            raise ArgumentError(
                f"solutions[{other!r}] is of other right-hand sides than solutions[{label!r}]: "
                "only solves of one system can be compared"
            )


def _checked_setup(setup: object, named: Mapping[str, Solution]) -> dict[str, int]:
    given = {} if setup is None else setup
    if not isinstance(given, Mapping):
        raise ArgumentTypeError(f"setup must be a mapping from labels, got {type(setup).__name__}")
    unknown = [label for label in given if label not in named]
    if unknown:
        raise ArgumentError(f"setup names {unknown!r}, the solutions are {list(named)!r}")
    return {
        label: checked_count(given.get(label, 0), f"setup[{label!r}]", minimum=0) for label in named
    }


def _two_axes(axes: object) -> tuple[Axes, Axes]:
    if axes is None:
        first, second = new_column(2, FIGURE_SIZE)
        return first, second
    if isinstance(axes, Axes) or not hasattr(axes, "__len__"):
        raise ArgumentTypeError(f"axes must be two matplotlib Axes, got {type(axes).__name__}")
    given = list(axes)  # type: ignore[call-overload]  # an array of axes is no Sequence
    if len(given) != 2:
        raise ShapeError(f"axes must be two matplotlib Axes, got {len(given)}")
    return axes_or_new(given[0]), axes_or_new(given[1])
