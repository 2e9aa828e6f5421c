"""Pictures of what was computed: matplotlib axes in, axes out (extra ``plot``)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from hessops.errors import ArgumentError, ArgumentTypeError
from hessops.operators.solution import Solution, SolveStatus

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# More lines than this are told apart by nobody: they share a label.
MOST_LABELS = 8


def convergence(
    solution: Solution | Mapping[str, Solution], ax: Axes | None = None, *, relative: bool = True
) -> Axes:
    """Draws the residual norms of every right-hand side against the steps.

    A dot marks the true residual of what was returned: filled where it met its tolerance, hollow
    where it did not. A dotted line is the loosest tolerance.

    Args:
        solution: From ``solve(rhs, history=True)``; or label -> such a solution, to compare
            several methods by colour.
        ax: Where to draw; ``None`` makes a figure.
        relative: Divides by ‖b‖.

    Returns:
        The axes.

    Raises:
        ArgumentTypeError: `solution` is something else.
        ArgumentError: A solution without a history, or none at all.
        ImportError: matplotlib is not installed.

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
    named = dict(solution) if isinstance(solution, Mapping) else {"": solution}
    _check(named)
    axes = _new_axes() if ax is None else ax
    for position, (label, one) in enumerate(named.items()):
        # One colour for each method, or for each right-hand side of a single one.
        _draw(axes, one, label, f"C{position % 10}" if len(named) > 1 else None, relative)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("‖b − Ax‖ / ‖b‖" if relative else "‖b − Ax‖")
    _, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(fontsize="small")
    return axes


def _check(named: Mapping[str, object]) -> None:
    if not named:
        raise ArgumentError("solution is an empty mapping: give at least one solution")
    for label, one in named.items():
        which = f"solution[{label!r}]" if label else "solution"
        if not isinstance(one, Solution):
            raise ArgumentTypeError(f"{which} must be a Solution, got {type(one).__name__}")
        if one.residual_history is None:
            raise ArgumentError(
                f"{which} has no residual history; solve with history=True (direct methods take no "
                "steps and have none)"
            )


def _draw(axes: Axes, one: Solution, label: str, colour: str | None, relative: bool) -> None:
    scales = torch.where(one.rhs_norms > 0, one.rhs_norms, 1.0) if relative else 1.0
    ends = (one.residual_norms / scales).tolist()
    bounds = one.tolerances / scales
    for row, history in enumerate(one.residual_history or ()):
        norms = history / (scales[row] if isinstance(scales, torch.Tensor) else scales)
        if not len(norms) or not bool((norms > 0).any()):
            continue  # a zero right-hand side has nothing to show on a logarithmic axis
        name = label if label and row == 0 else f"right-hand side {row}"
        shown = (label and row == 0) or (not label and len(one.status) <= MOST_LABELS)
        drawn = colour or f"C{row % 10}"
        axes.plot(
            range(len(norms)),
            norms.tolist(),
            color=drawn,
            linewidth=1.2,
            alpha=0.85,
            label=name if shown else "_",
        )
        met = one.status[row] is SolveStatus.CONVERGED
        if ends[row] > 0:
            axes.plot(
                [len(norms) - 1],
                [ends[row]],
                marker="o",
                markersize=5,
                color=drawn,
                markerfacecolor=drawn if met else "none",
                linestyle="none",
            )
    loosest = float(bounds.max()) if len(bounds) else 0.0
    if loosest > 0:
        axes.axhline(loosest, color=colour or "0.4", linestyle=":", linewidth=1)


def _new_axes() -> Axes:
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ImportError(
            "hessops.plotting draws with matplotlib; install it with: pip install 'hessops[plot]'"
        ) from error
    axes: Axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")[1]
    return axes
