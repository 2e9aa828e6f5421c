"""Convergence of solves: residual norms against steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from hessops.errors import ArgumentError, ArgumentTypeError
from hessops.operators.solution import Solution, SolveStatus
from hessops.plotting.arguments import Floats
from hessops.plotting.canvas import axes_or_new, count_along, explain, say
from hessops.plotting.style import MUTED, NEGATIVE, POSITIVE, Pen, pen

# More lines than this are told apart by nobody: they share a colour.
MOST_LABELS = 7
NOT_MET = "tolerance not met"


def convergence(
    solution: Solution | Mapping[str, Solution], ax: Axes | None = None, *, relative: bool = True
) -> Axes:
    """Draws the residual norms of every right-hand side against the steps.

    A dot marks the true residual of what was returned: filled where it met its tolerance, hollow
    where it did not; a triangle at the lower edge stands for a true residual of exactly zero. A
    dotted line is the loosest tolerance. Up to seven right-hand sides have a colour each; more of
    them share one, and those that did not meet their tolerance another.

    Args:
        solution: From ``solve(rhs, history=True)``; or label -> such a solution, to compare
            several methods by colour.
        ax: Where to draw; ``None`` makes a figure.
        relative: Divides by ‖b‖. A right-hand side of zeros has nothing to show and is left out.

    Returns:
        The axes.

    Raises:
        ArgumentTypeError: `solution` or `ax` is something else.
        ArgumentError: A solution without a history, or none at all.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("agg")
        >>> import torch
        >>> from hessops import CgOperator, DiagonalOperator
        >>> from hessops.plotting import convergence
        >>> A = DiagonalOperator(torch.arange(1.0, 9.0))
        >>> ax = convergence(CgOperator(A).solve(torch.ones(2, 8), history=True))
        >>> ax.get_yscale(), ax.get_xlabel()
        ('log', 'step')
    """
    named = checked_solutions(solution)
    axes = axes_or_new(ax)
    axes.set_yscale("log", nonpositive="clip")
    courses = {label: courses_of(one, relative) for label, one in named.items()}
    for position, (label, one) in enumerate(courses.items()):
        if isinstance(solution, Mapping):
            _draw_method(axes, one, label, pen(position))
        else:
            _draw_rows(axes, one)
    is_crowd = not isinstance(solution, Mapping) and len(courses[""]) > MOST_LABELS
    finish(axes, courses, relative, is_crowd=is_crowd)
    axes.set_xlabel("step")
    return axes


@dataclass(frozen=True)
class Course:
    """How the solve for one right-hand side, not zero, went.

    Attributes:
        row: Which right-hand side.
        norms: Residual norms from the start to the last step, ``(steps + 1,)``.
        end: The true residual norm of what was returned.
        tolerance: The bound that it had to meet.
        met: Whether it did.
    """

    row: int
    norms: Floats
    end: float
    tolerance: float
    met: bool


def checked_solutions(solution: object) -> dict[str, Solution]:
    """Label -> solution with a history; one without a label has an empty one."""
    given = solution if isinstance(solution, Mapping) else {"": solution}
    if not given:
        raise ArgumentError("solution is an empty mapping: give at least one solution")
    named: dict[str, Solution] = {}
    for label, one in given.items():
        which = f"solution[{label!r}]" if isinstance(solution, Mapping) else "solution"
        if not isinstance(one, Solution):
            raise ArgumentTypeError(f"{which} must be a Solution, got {type(one).__name__}")
        if one.residual_history is None:
            raise ArgumentError(
                f"{which} has no residual history; solve with history=True (direct methods take no "
                "steps and have none)"
            )
        named[str(label)] = one
    return named


def courses_of(solution: Solution, relative: bool) -> list[Course]:
    """One for every right-hand side that is not zero."""
    courses = []
    for row, history in enumerate(solution.residual_history or ()):
        norm = float(solution.rhs_norms[row])
        if norm == 0 or not len(history):
            continue
        scale = norm if relative else 1.0
        norms = history.detach().cpu().double().numpy() / scale
        courses.append(
            Course(
                row,
                # What overflowed in a recurrence that diverged cannot be drawn: a line ends there.
                np.where(np.isfinite(norms), norms, np.nan),
                float(solution.residual_norms[row]) / scale,
                float(solution.tolerances[row]) / scale,
                solution.status[row] is SolveStatus.CONVERGED,
            )
        )
    return courses


def _draw_rows(axes: Axes, courses: list[Course]) -> None:
    """The right-hand sides of one solve."""
    if len(courses) > MOST_LABELS:
        _draw_crowd(axes, courses)
        return
    for position, course in enumerate(courses):
        label = f"right-hand side {course.row}" if len(courses) > 1 else "_"
        _draw_course(axes, course, pen(position), label, crowded=False)


def _draw_crowd(axes: Axes, courses: list[Course]) -> None:
    """Many right-hand sides, in two colours, with how many there are of each."""
    for met, color, name in ((True, POSITIVE, "converged"), (False, NEGATIVE, "not converged")):
        some = [course for course in courses if course.met is met]
        for position, course in enumerate(some):
            label = f"{len(some)} {name}" if position == 0 else "_"
            _draw_course(axes, course, Pen(color, "-"), label, crowded=True)


def _draw_method(axes: Axes, courses: list[Course], label: str, style: Pen) -> None:
    """The right-hand sides of one of several solves, in one colour."""
    for position, course in enumerate(courses):
        shown = label if position == 0 else "_"
        _draw_course(axes, course, style, shown, crowded=len(courses) > MOST_LABELS)


def _draw_course(axes: Axes, course: Course, style: Pen, label: str, *, crowded: bool) -> None:
    axes.plot(
        np.arange(len(course.norms)),
        course.norms,
        color=style.color,
        linestyle=style.dashes,
        linewidth=0.7 if crowded else 1.4,
        alpha=0.6 if crowded else 1.0,
        label=label,
    )
    draw_end(axes, len(course.norms) - 1, course.end, style.color, met=course.met, small=crowded)


def draw_end(
    axes: Axes, x: float, residual: float, color: str, *, met: bool, small: bool = False
) -> None:
    """The mark of a true residual: filled where it was small enough, below all where it is 0."""
    zero = residual == 0
    axes.plot(
        [x],
        [0 if zero else residual],
        transform=axes.get_xaxis_transform() if zero else axes.transData,
        clip_on=not zero,
        marker="v" if zero else "o",
        markersize=3.5 if small else 5.5,
        color=color,
        markerfacecolor=color if met else "white",
        linestyle="none",
        zorder=3,
    )


def finish(
    axes: Axes, courses: Mapping[str, list[Course]], relative: bool, *, is_crowd: bool = False
) -> None:
    """Tolerances, labels and a legend of what needs one."""
    every = [course for some in courses.values() for course in some]
    axes.set_ylabel("‖b − Ax‖ / ‖b‖" if relative else "‖b − Ax‖")
    count_along(axes.xaxis)
    if not every:
        say(axes, "every right-hand side is zero: nothing to solve")
        return
    lines = _draw_tolerances(axes, courses)
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    # Where there is one colour for those that did not converge, the hollow marks are theirs.
    if not is_crowd and not all(course.met for course in every):
        named[NOT_MET] = Line2D(
            [], [], color=MUTED, marker="o", markerfacecolor="white", linestyle="none"
        )
    if len(named) > 1 or is_crowd:
        explain(axes, {**named, **lines})
    else:
        _write_tolerance(axes, lines)


def _draw_tolerances(axes: Axes, courses: Mapping[str, list[Course]]) -> dict[str, Line2D]:
    """The loosest of each solve, or one line where they agree; what they are called -> a line."""
    loosest = {
        label: max(course.tolerance for course in some) for label, some in courses.items() if some
    }
    several = max(loosest.values()) > min(loosest.values()) * 1.01
    drawn: dict[str, Line2D] = {}
    for position, label in enumerate(courses):
        if loosest.get(label, 0) > 0 and (several or not drawn):
            color = pen(position).color if several else MUTED
            line = axes.axhline(loosest[label], color=color, linestyle=":", linewidth=1)
            drawn.setdefault("tolerances" if several else "tolerance", line)
    return drawn


def _write_tolerance(axes: Axes, lines: Mapping[str, Line2D]) -> None:
    """Beside the line, where no legend says what it is."""
    for name, line in lines.items():
        axes.annotate(
            name,
            (0, float(np.asarray(line.get_ydata())[0])),
            xytext=(3, 2),
            textcoords="offset points",
            xycoords=("axes fraction", "data"),
            color=MUTED,
            fontsize="small",
        )
