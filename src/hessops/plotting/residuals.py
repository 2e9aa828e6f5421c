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
from hessops.plotting.canvas import axes_or_new, count_along, say
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
    axes.set_yscale("log", nonpositive="mask")
    courses = {label: courses_of(one, relative) for label, one in named.items()}
    for position, (label, one) in enumerate(courses.items()):
        if isinstance(solution, Mapping):
            _draw_method(axes, one, label, pen(position))
        else:
            _draw_rows(axes, one)
    finish(axes, courses, relative)
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
    few = len(courses) <= MOST_LABELS
    for position, course in enumerate(courses):
        shared = Pen(POSITIVE if course.met else NEGATIVE, "-")
        style = pen(position) if few else shared
        label = f"right-hand side {course.row}" if few and len(courses) > 1 else "_"
        _draw_course(axes, course, style, label, crowded=not few)


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


def finish(axes: Axes, courses: Mapping[str, list[Course]], relative: bool) -> None:
    """Tolerances, labels and a legend of what needs one."""
    every = [course for some in courses.values() for course in some]
    axes.set_ylabel("‖b − Ax‖ / ‖b‖" if relative else "‖b − Ax‖")
    count_along(axes.xaxis)
    if not every:
        say(axes, "every right-hand side is zero: nothing to solve")
        return
    _draw_tolerances(axes, courses)
    handles, labels = axes.get_legend_handles_labels()
    if not all(course.met for course in every) and NOT_MET not in labels:
        hollow = Line2D([], [], color=MUTED, marker="o", markerfacecolor="white", linestyle="none")
        handles, labels = [*handles, hollow], [*labels, NOT_MET]
    if labels:
        axes.legend(handles, labels, fontsize="small", frameon=False)


def _draw_tolerances(axes: Axes, courses: Mapping[str, list[Course]]) -> None:
    """The loosest of each solve, or one line where they agree."""
    loosest = {
        label: max(course.tolerance for course in some) for label, some in courses.items() if some
    }
    several = max(loosest.values()) > min(loosest.values()) * 1.01
    lines = loosest if several else dict(list(loosest.items())[:1])
    for position, label in enumerate(courses):
        if lines.get(label, 0) > 0:
            color = pen(position).color if several else MUTED
            axes.axhline(lines[label], color=color, linestyle=":", linewidth=1)
    lowest = min(lines.values())
    if lowest > 0:
        axes.annotate(
            "tolerances" if several else "tolerance",
            (0, lowest),
            xytext=(3, 2),
            textcoords="offset points",
            xycoords=("axes fraction", "data"),
            color=MUTED,
            fontsize="small",
        )
