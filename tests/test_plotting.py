"""Pictures: what they show, from axes that were given or made."""

from __future__ import annotations

import matplotlib
import pytest
import torch
from reference import random_spd
from solver_cases import normal

from hessops import CgOperator, DirectSolveOperator, MatrixOperator, NystroemPreconditioner
from hessops.plotting import convergence

matplotlib.use("agg")
from matplotlib import pyplot  # after the backend is chosen


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def test_each_right_hand_side_is_a_line_with_a_mark_at_its_true_residual() -> None:
    inverse = CgOperator(MatrixOperator(random_spd(20, 1e3)), maxiter=30)
    rhs = normal(3, 20)
    rhs[2] = 0
    solution = inverse.solve(rhs, history=True)
    axes = convergence(solution)
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(lines) == 2
    for row, line in enumerate(lines):
        drawn = torch.tensor(line.get_ydata())
        assert torch.allclose(drawn, solution.residual_history[row] / rhs[row].norm())
    marks = [line for line in axes.lines if line.get_marker() == "o"]
    assert [mark.get_ydata()[0] for mark in marks] == pytest.approx(
        solution.relative_residual_norms[:2].tolist()
    )
    assert axes.get_yscale() == "log"


def test_marks_are_hollow_where_the_tolerance_was_not_met() -> None:
    matrix = MatrixOperator(random_spd(20, 1e6))
    for maxiter, face in ((3, "none"), (2000, "C0")):
        solution = CgOperator(matrix, maxiter=maxiter).solve(normal(20), history=True)
        axes = convergence(solution, pyplot.figure().add_subplot())
        (mark,) = [line for line in axes.lines if line.get_marker() == "o"]
        assert mark.get_markerfacecolor() == face


@pytest.mark.filterwarnings("ignore::hessops.errors.ZeroShiftWarning")
def test_several_methods_are_compared_on_given_axes() -> None:
    matrix, rhs = MatrixOperator(random_spd(20, 1e4)), normal(2, 20)
    recipe = NystroemPreconditioner(rank=8)
    solutions = {
        "plain": CgOperator(matrix).solve(rhs, history=True),
        "Nyström": CgOperator(matrix, preconditioner=recipe).solve(rhs, history=True),
    }
    axes = pyplot.figure().add_subplot()
    assert convergence(solutions, axes, relative=False) is axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["plain", "Nyström"]
    assert axes.get_ylabel() == "‖b − Ax‖"


def test_what_cannot_be_drawn_is_refused() -> None:
    matrix, rhs = random_spd(5, 10.0), normal(5)
    with pytest.raises(ValueError, match="history=True"):
        convergence(CgOperator(MatrixOperator(matrix)).solve(rhs))
    with pytest.raises(ValueError, match="direct methods"):
        convergence({"direct": DirectSolveOperator(matrix).solve(rhs, history=True)})
    with pytest.raises(TypeError, match="Solution"):
        convergence(rhs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        convergence({})
