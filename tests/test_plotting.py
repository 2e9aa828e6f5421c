"""Pictures: they show the data, on axes that were given or made, and change nothing else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from reference import random_spd
from scipy.stats import spearmanr
from solver_cases import normal
from torch import Tensor

from hessops import (
    CgOperator,
    DirectSolveOperator,
    MatrixOperator,
    NystroemPreconditioner,
    Solution,
)
from hessops.errors import (
    ArgumentError,
    ArgumentTypeError,
    DtypeError,
    HessopsError,
    NonFiniteError,
    ShapeError,
)
from hessops.estimators import Estimate
from hessops.plotting import (
    convergence,
    eigenvalues,
    estimates,
    influence_heatmap,
    preconditioner_comparison,
    score_comparison,
    spectral_density,
    top_examples,
    top_rows,
)
from hessops.plotting.style import MINUS, NEGATIVE, POSITIVE, aligned, signed

matplotlib.use("agg")
from matplotlib import pyplot  # after the backend is chosen
from matplotlib.axes import Axes
from matplotlib.figure import Figure

NAN = torch.tensor([1.0, torch.nan])


class Quadratures:
    """A density of eigenvalues, as `SpectralDensity` has it: some probes, some steps each."""

    def __init__(self, nodes: Tensor, weights: Tensor, size: int) -> None:
        self.nodes, self.weights, self.size = nodes, weights, size
        self.extremes = (nodes.min().item(), nodes.max().item())
        self.default_width = (self.extremes[1] - self.extremes[0]) / nodes.shape[1] or 0.01

    def on(self, grid: Tensor, width: float | None = None) -> tuple[Tensor, Tensor]:
        sigma = width or self.default_width
        kernel = torch.exp(-0.5 * ((grid[:, None, None] - self.nodes) / sigma) ** 2)
        probes = (kernel * self.weights).sum(dim=2) / (2 * torch.pi) ** 0.5 / sigma
        return probes.mean(dim=1), probes.std(dim=1) / len(self.nodes) ** 0.5


def density() -> Quadratures:
    return Quadratures(
        normal(4, 5).sort(dim=1).values, normal(4, 5, seed=2).softmax(dim=1), size=100
    )


def pairs(values: list[float], residual_norms: list[float]) -> SimpleNamespace:
    return SimpleNamespace(values=torch.tensor(values), residual_norms=torch.tensor(residual_norms))


def solved(rows: int = 2, **settings: object) -> Solution:
    inverse = CgOperator(MatrixOperator(random_spd(20, 1e3)), **settings)
    return inverse.solve(normal(rows, 20), history=True)


DRAWINGS: dict[str, Callable[[Axes | None], Axes]] = {
    "convergence": lambda ax: convergence(solved(), ax),
    "spectral_density": lambda ax: spectral_density(density(), ax, exact=normal(9)),
    "eigenvalues": lambda ax: eigenvalues(pairs([2.0, 0.0, -1.0], [0.1, 0.1, 2.0]), ax),
    "influence_heatmap": lambda ax: influence_heatmap(
        normal(3, 5), ax, train_labels=[1, 0, 1, 0, 2]
    ),
    "score_comparison": lambda ax: score_comparison(normal(9), normal(9, seed=2), ax),
    "estimates": lambda ax: estimates({"a": Estimate(1.0, 0.5, 8, "hutchinson")}, ax, exact=1.2),
    "top_examples": lambda ax: top_examples(normal(5, 4, 4), normal(5), ax, labels=range(5)),
    "top_rows": lambda ax: top_rows(normal(5, 4), normal(5), ax),
}

SOLUTION = solved()
NOT_DRAWN: dict[str, tuple[type[HessopsError], str, Callable[[], object]]] = {
    "density: another type": (ArgumentTypeError, "SpectralDensity", lambda: spectral_density(NAN)),
    "density: no width": (ArgumentError, "width", lambda: spectral_density(density(), width=0.0)),
    "density: exact NaN": (NonFiniteError, "exact", lambda: spectral_density(density(), exact=NAN)),
    "density: exact empty": (ShapeError, "exact", lambda: spectral_density(density(), exact=[])),
    "eigenvalues: NaN": (NonFiniteError, "1 NaN .* of 2", lambda: eigenvalues(NAN)),
    "eigenvalues: none": (ShapeError, "nothing to draw", lambda: eigenvalues(torch.empty(0))),
    "eigenvalues: a matrix": (ShapeError, "dimension", lambda: eigenvalues(torch.eye(2))),
    "eigenvalues: complex": (DtypeError, "complex", lambda: eigenvalues(torch.ones(2) * 1j)),
    "eigenvalues: a string": (ArgumentTypeError, "values", lambda: eigenvalues("12")),
    "eigenvalues: ragged": (ShapeError, "ragged", lambda: eigenvalues([[1.0], [1.0, 2.0]])),
    "eigenvalues: other errors": (
        ShapeError,
        "2 .* 1",
        lambda: eigenvalues(pairs([1.0, 2.0], [1.0])),
    ),
    "eigenvalues: negative error": (
        ArgumentError,
        "negative",
        lambda: eigenvalues(pairs([1.0], [-1.0])),
    ),
    "heatmap: a vector": (ShapeError, "scores", lambda: influence_heatmap(torch.ones(3))),
    "heatmap: NaN": (NonFiniteError, "scores", lambda: influence_heatmap(NAN[None])),
    "heatmap: empty": (ShapeError, "scores", lambda: influence_heatmap(torch.ones(0, 3))),
    "heatmap: labels": (
        ShapeError,
        "train_labels must hold 3",
        lambda: influence_heatmap(torch.ones(2, 3), train_labels=[1]),
    ),
    "heatmap: labels of labels": (
        ShapeError,
        "test_labels",
        lambda: influence_heatmap(torch.ones(2, 3), test_labels=torch.eye(2)),
    ),
    "heatmap: a label string": (
        ArgumentTypeError,
        "test_labels",
        lambda: influence_heatmap(torch.ones(2, 3), test_labels="ab"),
    ),
    "heatmap: quantile": (
        ArgumentError,
        "quantile",
        lambda: influence_heatmap(torch.ones(2, 3), quantile=2),
    ),
    "heatmap: cells": (
        ArgumentError,
        r"max_cells\[1\]",
        lambda: influence_heatmap(torch.ones(2, 3), max_cells=(1, 0)),
    ),
    "heatmap: cells of another type": (
        ArgumentTypeError,
        "max_cells",
        lambda: influence_heatmap(torch.ones(2, 3), max_cells=3),
    ),
    "scores: of other points": (ShapeError, "3 .* 2", lambda: score_comparison([1, 2, 3], [1, 2])),
    "scores: one": (ShapeError, "two", lambda: score_comparison([1], [1])),
    "scores: names": (
        ArgumentTypeError,
        "names",
        lambda: score_comparison([1, 2], [1, 2], names="ab"),
    ),
    "estimates: none": (ArgumentError, "empty", lambda: estimates({})),
    "estimates: no mapping": (ArgumentTypeError, "mapping", lambda: estimates([1.0])),
    "estimates: a number": (ArgumentTypeError, "Estimate", lambda: estimates({"a": 1.0})),
    "estimates: NaN": (
        NonFiniteError,
        "nan",
        lambda: estimates({"a": Estimate(torch.nan, 0.0, 1, "a")}),
    ),
    "estimates: entries": (
        ArgumentError,
        "entries",
        lambda: estimates({"a": Estimate(torch.ones(2), torch.ones(2), 1, "a")}),
    ),
    "images: none": (ArgumentTypeError, "images", lambda: top_examples([1], [1.0])),
    "images: number": (
        ShapeError,
        "each of 2",
        lambda: top_examples(torch.ones(3, 4, 4), [1.0, 2.0]),
    ),
    "images: channels": (
        ShapeError,
        "channels",
        lambda: top_examples(torch.ones(1, 2, 4, 4), [1.0]),
    ),
    "images: NaN": (
        NonFiniteError,
        "images",
        lambda: top_examples(torch.full((1, 4, 4), torch.nan), [1.0]),
    ),
    "images: integers": (
        ArgumentError,
        "255",
        lambda: top_examples(torch.full((1, 4, 4), 256), [1.0]),
    ),
    "images: test image": (
        ShapeError,
        "test_image",
        lambda: top_examples(torch.ones(1, 4, 4), [1.0], test_image=torch.ones(3, 4)),
    ),
    "images: k": (ArgumentError, "k must", lambda: top_examples(torch.ones(1, 4, 4), [1.0], k=0)),
    "images: colours": (
        ArgumentError,
        "cmap",
        lambda: top_examples(torch.ones(1, 4, 4), [1.0], cmap="no"),
    ),
    "images: labels": (
        ShapeError,
        "labels",
        lambda: top_examples(torch.ones(1, 4, 4), [1.0], labels=[]),
    ),
    "rows: scores": (ShapeError, "features has 3", lambda: top_rows(torch.eye(3), [1.0])),
    "rows: test row": (
        ShapeError,
        "test_row",
        lambda: top_rows(torch.eye(2), [1.0, 2.0], test_row=[1.0]),
    ),
    "rows: names": (ShapeError, "names", lambda: top_rows(torch.eye(2), [1.0, 2.0], names=["a"])),
    "rows: names of another type": (
        ArgumentTypeError,
        "strings",
        lambda: top_rows(torch.eye(2), [1.0, 2.0], names=[1, 2]),
    ),
    "rows: NaN": (NonFiniteError, "scores", lambda: top_rows(torch.eye(2), NAN)),
    "comparison: no mapping": (
        ArgumentTypeError,
        "mapping",
        lambda: preconditioner_comparison(SOLUTION),
    ),
    "comparison: another system": (
        ArgumentError,
        "other right-hand sides",
        lambda: preconditioner_comparison({"a": SOLUTION, "b": solved(1)}),
    ),
    "comparison: unknown set-up": (
        ArgumentError,
        "'b'",
        lambda: preconditioner_comparison({"a": SOLUTION}, setup={"b": 1}),
    ),
    "comparison: negative set-up": (
        ArgumentError,
        "setup",
        lambda: preconditioner_comparison({"a": SOLUTION}, setup={"a": -1}),
    ),
    "comparison: set-up of another type": (
        ArgumentTypeError,
        "setup",
        lambda: preconditioner_comparison({"a": SOLUTION}, setup=1),
    ),
    "comparison: axes": (
        ArgumentTypeError,
        "axes",
        lambda: preconditioner_comparison({"a": SOLUTION}, 1),
    ),
    "comparison: three axes": (
        ShapeError,
        "3",
        lambda: preconditioner_comparison({"a": SOLUTION}, [1, 2, 3]),
    ),
}


@pytest.fixture(autouse=True)
def _close_figures():
    pyplot.close("all")  # also those of the examples in docstrings
    yield
    pyplot.close("all")


# --- what all of them keep ---------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWINGS)
def test_given_axes_are_drawn_on_and_returned(name: str) -> None:
    axes = Figure(layout="constrained").add_subplot()
    assert DRAWINGS[name](axes) is axes
    assert axes.has_data() or axes.texts
    assert not pyplot.get_fignums()


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_layout_leaves_both_of_two_drawings_their_room(name: str) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes in (left, right):
        DRAWINGS[name](axes)
    figure.canvas.draw()
    assert min(left.get_position().width, right.get_position().width) > 0.25


@pytest.mark.parametrize("name", DRAWINGS)
def test_one_figure_is_made_without_axes(name: str) -> None:
    axes = DRAWINGS[name](None)
    assert pyplot.get_fignums() == [axes.figure.number]
    axes.figure.canvas.draw()


@pytest.mark.parametrize("name", DRAWINGS)
def test_no_setting_and_no_current_axes_are_changed(name: str) -> None:
    before = dict(matplotlib.rcParams)
    maps = set(matplotlib.colormaps)
    current = pyplot.figure().add_subplot()
    other = pyplot.figure().add_subplot()
    pyplot.sca(current)
    DRAWINGS[name](other)
    assert pyplot.gca() is current
    assert dict(matplotlib.rcParams) == before
    assert set(matplotlib.colormaps) == maps


@pytest.mark.parametrize("name", DRAWINGS)
def test_something_else_than_axes_is_refused(name: str) -> None:
    with pytest.raises(ArgumentTypeError, match="Axes"):
        DRAWINGS[name](pyplot.figure())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NOT_DRAWN)
def test_what_cannot_be_drawn_is_refused_and_leaves_no_figure(name: str) -> None:
    error, words, draw = NOT_DRAWN[name]
    with pytest.raises(error, match=words):
        draw()
    assert not pyplot.get_fignums()


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("hessops.plotting")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hessops\[plot\]'"):
        importlib.import_module("hessops.plotting")


def texts_overlap(axes: Axes) -> list[tuple[str, str]]:
    """Pairs of texts in the axes whose boxes share more than a hair."""
    figure = axes.figure
    figure.canvas.draw()
    texts = [text for text in axes.texts if text.get_text()]
    boxes = [text.get_window_extent().padded(-1) for text in texts]
    return [
        (texts[i].get_text(), texts[j].get_text())
        for i in range(len(texts))
        for j in range(i)
        if boxes[i].overlaps(boxes[j])
    ]


@pytest.mark.parametrize("inches", [None, (4, 3), (8, 3)], ids=str)
def test_no_text_of_a_table_or_of_images_covers_another(inches: tuple[float, float] | None) -> None:
    def axes() -> Axes | None:
        return None if inches is None else pyplot.figure(figsize=inches).add_subplot()

    labels = ["automobile", "a truck with a trailer"] * 6
    scores = normal(12) * 1e-7
    images, table = torch.rand(12, 3, 9, 6), normal(12, 7) * 1e3
    a = top_examples(images, scores, axes(), test_image=images[0], labels=labels, test_label="car")
    b = top_rows(table, scores, axes(), test_row=table[0], labels=labels, test_label="car")
    for drawn in (a, b):
        assert not texts_overlap(drawn)


# --- convergence -------------------------------------------------------------------------


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
    for maxiter, face in ((3, "white"), (2000, POSITIVE)):
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
    assert legend(axes)[:2] == ["plain", "Nyström"]
    assert axes.get_ylabel() == "‖b − Ax‖"


def legend(axes: Axes) -> list[str]:
    drawn = axes.get_legend()
    return [] if drawn is None else [text.get_text() for text in drawn.get_texts()]


def test_many_right_hand_sides_are_coloured_and_counted_by_outcome() -> None:
    matrix = torch.diag(torch.logspace(-3, 0, 60, dtype=torch.float64))
    rhs = normal(9, 60)
    rhs[4:, :40] = 0  # which leaves an easier system
    solution = CgOperator(MatrixOperator(matrix), maxiter=30).solve(rhs, history=True)
    assert solution.converged.tolist() == [False] * 4 + [True] * 5
    axes = convergence(solution)
    assert legend(axes) == ["5 converged", "4 not converged", "tolerance"]
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert [line.get_color() for line in lines] == [POSITIVE] * 5 + [NEGATIVE] * 4


def test_one_right_hand_side_needs_no_legend() -> None:
    axes = convergence(solved(1))
    assert axes.get_legend() is None
    assert [text.get_text() for text in axes.texts] == ["tolerance"]


def test_a_residual_of_zero_is_marked_below_the_logarithmic_axis() -> None:
    solution = CgOperator(MatrixOperator(torch.eye(4))).solve(torch.ones(4), history=True)
    (mark,) = [line for line in convergence(solution).lines if line.get_marker() == "v"]
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (1, 0)


def test_only_zero_right_hand_sides_are_said_to_be_that() -> None:
    solution = CgOperator(MatrixOperator(torch.eye(4))).solve(torch.zeros(2, 4), history=True)
    for axes in (convergence(solution), *preconditioner_comparison({"CG": solution})):
        assert "zero" in axes.texts[0].get_text()
        axes.figure.canvas.draw()


def test_solutions_without_steps_are_refused() -> None:
    matrix, rhs = random_spd(5, 10.0), normal(5)
    with pytest.raises(ArgumentError, match="history=True"):
        convergence(CgOperator(MatrixOperator(matrix)).solve(rhs))
    with pytest.raises(ArgumentError, match=r"solution\['direct'\].*direct methods"):
        convergence({"direct": DirectSolveOperator(matrix).solve(rhs, history=True)})
    with pytest.raises(ArgumentTypeError, match="Solution"):
        convergence(rhs)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="empty"):
        convergence({})
    assert not pyplot.get_fignums()


# --- preconditioners ---------------------------------------------------------------------


def test_preconditioners_are_compared_by_steps_and_by_applications_with_set_up() -> None:
    named = {"loose": solved(3, rtol=1e-2), "strict": solved(3, rtol=1e-8)}
    panels = preconditioner_comparison(named, setup={"strict": 7})
    for position, (label, solution) in enumerate(named.items()):
        steps = int(solution.iterations.max())
        setup = 7 if label == "strict" else 0
        ends = ((0, steps), (setup, setup + solution.num_applications))
        for panel, (start, end) in zip(panels, ends, strict=True):
            line = next(one for one in panel.lines if one.get_label() == label)
            assert line.get_xdata()[[0, -1]].tolist() == pytest.approx([start, end])
            marks = [one for one in panel.lines if one.get_marker() == "o"]
            worst = solution.relative_residual_norms.max().item()
            assert (
                marks[position].get_xdata()[0],
                marks[position].get_ydata()[0],
            ) == pytest.approx((end, worst))


def test_the_line_of_a_solve_is_its_worst_right_hand_side_and_the_band_reaches_the_best() -> None:
    solution = solved(3)
    by_step, _ = preconditioner_comparison({"CG": solution})
    steps = int(solution.iterations.max()) + 1
    rows = [
        np.pad((history / norm).numpy(), (0, steps - len(history)), mode="edge")
        for history, norm in zip(solution.residual_history, solution.rhs_norms, strict=True)
    ]
    assert by_step.lines[0].get_ydata() == pytest.approx(np.max(rows, axis=0))
    (band,) = by_step.collections
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(np.min(rows))


def test_a_comparison_is_drawn_on_two_given_axes() -> None:
    given = Figure().subplots(1, 2)
    assert preconditioner_comparison({"CG": solved()}, given) == tuple(given)
    assert not pyplot.get_fignums()


# --- spectra -----------------------------------------------------------------------------


def test_the_density_and_its_standard_error_are_drawn_as_they_are() -> None:
    found = density()
    axes = spectral_density(found, log=False)
    grid, values = map(np.asarray, axes.lines[0].get_data())
    expected, errors = found.on(torch.tensor(grid), found.default_width)
    assert values == pytest.approx(expected.numpy())
    (band,) = axes.collections
    highest = band.get_paths()[0].vertices[:, 1].max()
    assert highest == pytest.approx((expected + errors).max().item())
    assert set(found.nodes.flatten().tolist()) <= set(grid.tolist())
    assert np.trapezoid(values, grid) == pytest.approx(1, abs=1e-3)


def test_the_logarithmic_axis_ends_at_one_eigenvalue_over_the_whole_range() -> None:
    found = density()
    axes = spectral_density(found)
    low, high = found.extremes
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] == pytest.approx(1 / (found.size * (high - low)))


def test_exact_eigenvalues_are_ticks_and_smoothed_by_the_same_gaussian() -> None:
    exact = normal(300)
    axes = spectral_density(density(), exact=exact, width=0.3)
    grid, values = map(np.asarray, axes.lines[1].get_data())
    gaussians = np.exp(-0.5 * ((grid[:, None] - exact.numpy()) / 0.3) ** 2)
    assert values == pytest.approx(gaussians.mean(axis=1) / (0.3 * (2 * np.pi) ** 0.5))
    ticks = [path.vertices[0, 0] for path in axes.collections[1].get_paths()]
    assert ticks == pytest.approx(exact.tolist())
    assert legend(axes) == ["estimate", "exact"]


def test_a_spectrum_of_one_point_is_drawn() -> None:
    found = Quadratures(torch.full((2, 1), 2.0).double(), torch.ones(2, 1).double(), 3)
    axes = spectral_density(found)
    peak = int(np.argmax(axes.lines[0].get_ydata()))
    assert axes.lines[0].get_xdata()[peak] == 2.0


def marks_of(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Marker and whether it is filled -> points."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in axes.lines:
        if line.get_linestyle() == "None" and len(line.get_xdata()):
            hollow = "" if line.get_markerfacecolor() != "white" else " hollow"
            points = zip(*map(np.asarray, line.get_data()), strict=True)
            found[line.get_marker() + hollow] = [(float(x), float(y)) for x, y in points]
    return found


def test_eigenvalues_are_drawn_from_the_largest_with_a_mark_for_each_sign() -> None:
    axes = eigenvalues(torch.tensor([-2.0, 0.0, 8.0, 4.0]), log=False)
    assert marks_of(axes) == {"o": [(1, 8), (2, 4)], "x": [(3, 0)], "v": [(4, -2)]}
    assert axes.get_legend() is None  # the axis shows the signs


def test_a_logarithmic_axis_keeps_the_signs_and_the_zeros() -> None:
    axes = eigenvalues(torch.tensor([-2.0, 0.0, 8.0, 4.0]))
    # The cross is at the lower edge, whatever the limits.
    assert marks_of(axes) == {"o": [(1, 8), (2, 4)], "x": [(3, 0)], "v": [(4, 2)]}
    assert legend(axes) == ["positive", "negative", "zero"]
    assert axes.get_ylabel() == "|eigenvalue|"
    assert legend(eigenvalues(-torch.ones(2))) == ["negative"]
    assert legend(eigenvalues(torch.ones(2))) == []


@pytest.mark.parametrize("log", [False, True])
def test_residual_norms_are_bars_and_marks_are_hollow_where_they_reach_zero(log: bool) -> None:
    axes = eigenvalues(pairs([4.0, 1.0, -1.0], [0.5, 2.0, 0.25]), log=log)
    sign = 1 if log else -1
    assert marks_of(axes) == {"o": [(1, 4)], "o hollow": [(2, 1)], "v": [(3, sign)]}
    assert "sign uncertain" in legend(axes)
    bars = [path.vertices[:, 1].tolist() for path in axes.collections[0].get_paths()]
    lower_edge = axes.get_ylim()[0] if log else -1.0
    assert bars[0] == [3.5, 4.5]
    assert bars[1] == pytest.approx([lower_edge, 3.0])
    assert sorted(bars[2]) == ([0.75, 1.25] if log else [-1.25, -0.75])


def test_zeros_alone_are_drawn_on_a_linear_axis() -> None:
    axes = eigenvalues(torch.zeros(3))
    assert axes.get_yscale() == "linear"
    assert marks_of(axes) == {"x": [(1, 0), (2, 0), (3, 0)]}


# --- influence ---------------------------------------------------------------------------


def cells_of(axes: Axes) -> np.ndarray:
    return np.asarray(axes.collections[0].get_array())


def test_the_cells_of_a_heat_map_are_the_scores_with_limits_about_zero() -> None:
    scores = normal(4, 6)
    axes = influence_heatmap(scores, quantile=1)
    mesh = axes.collections[0]
    assert cells_of(axes) == pytest.approx(scores.numpy())
    largest = scores.abs().max().item()
    assert mesh.get_clim() == pytest.approx((-largest, largest))
    assert mesh.cmap(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.02)
    assert axes.get_xlabel() == "training point"
    assert axes.yaxis_inverted()


def test_outliers_do_not_set_the_colours_and_are_counted() -> None:
    scores = normal(20, 20)
    scores[3, 4] = -1e3
    axes = influence_heatmap(scores)
    assert axes.collections[0].get_clim()[1] < 5
    bar = axes.collections[0].colorbar
    assert bar.extend in ("min", "both")
    assert "% of cells beyond" in bar.ax.get_ylabel()
    no_outliers = influence_heatmap(torch.rand(20, 20))
    assert no_outliers.collections[0].colorbar.extend == "neither"


def test_labels_sort_rows_and_columns_by_class_and_in_their_order_within_one() -> None:
    scores = torch.arange(6.0).reshape(2, 3)
    axes = influence_heatmap(
        scores, test_labels=torch.tensor([10, 9]), train_labels=["b", "a", "b"]
    )
    assert cells_of(axes).tolist() == [[4, 3, 5], [1, 0, 2]]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["9", "10"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b"]
    assert axes.get_xticks().tolist() == [0, 1.5]


def test_a_large_matrix_is_drawn_by_means_that_mix_no_classes_and_says_so() -> None:
    scores = normal(9, 100)
    labels = torch.arange(100) % 3
    axes = influence_heatmap(scores, train_labels=labels, max_cells=(3, 10))
    edges = np.asarray(axes.collections[0].get_coordinates())[0, :, 0] + 0.5
    order = labels.argsort(stable=True)
    bounds = edges.round().astype(int).tolist()
    assert {34, 67} <= set(bounds)
    for column, (start, end) in enumerate(pairwise(bounds)):
        block = scores[:, order[start:end]].reshape(3, 3, -1)
        assert cells_of(axes)[:, column] == pytest.approx(block.mean(dim=(1, 2)).numpy())
    assert axes.get_xlabel().endswith("each cell: mean of 3 × 11–12 scores")


def test_scores_of_zero_are_white() -> None:
    mesh = influence_heatmap(torch.zeros(2, 3)).collections[0]
    assert mesh.get_clim() == (-1, 1)


def test_names_of_many_classes_do_not_touch() -> None:
    labels = [f"class {position}" for position in range(100)]
    axes = influence_heatmap(normal(100, 100), test_labels=labels, train_labels=labels)
    axes.figure.canvas.draw()
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [text.get_window_extent() for text in ticks]
        assert len(boxes) > 10
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def images_of(axes: Axes) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in axes.images]


def test_the_images_shown_are_the_extreme_ones_with_label_and_score() -> None:
    images = torch.rand(6, 4, 5)
    scores = torch.tensor([0.1, -3.0, 2.0, 0.0, -1.0, 5.0])
    axes = top_examples(
        images, scores, test_image=torch.zeros(4, 5), labels=list("abcdef"), test_label="c", k=2
    )
    test, *shown = images_of(axes)
    assert not test.any()
    for image, point in zip(shown, [5, 2, 1, 4], strict=True):
        assert image == pytest.approx(images[point].numpy())
    texts = [text.get_text() for text in axes.texts]
    assert texts[:2] == ["test image", "c"]
    assert texts[2:7] == ["most helpful", "f", "+5.00", "c", "+2.00"]
    assert texts[7:] == ["most harmful", "b", "−3.00", "e", "−1.00"]
    bold = [t.get_text() for t in axes.texts if t.get_fontweight() == "bold"]
    assert bold == ["test image", "most helpful", "f", "most harmful", "b", "e"]


def test_a_point_is_never_called_helpful_for_want_of_better_ones() -> None:
    axes = top_examples(torch.rand(3, 4, 4), torch.tensor([0.0, -1.0, -2.0]))
    assert len(axes.images) == 2
    assert [text.get_text() for text in axes.texts][:2] == [
        "most helpful",
        "none: no score is positive",
    ]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (torch.full((1, 3, 4, 5), 51, dtype=torch.uint8), torch.full((4, 5, 3), 0.2)),
        (torch.full((1, 1, 4, 5), 0.25), torch.full((4, 5), 0.25)),
        (torch.full((1, 4, 5, 3), 0.25), torch.full((4, 5, 3), 0.25)),
        (torch.arange(-1.0, 3.0).reshape(1, 2, 2), torch.tensor([[0, 1], [2, 3]]) / 3),
    ],
    ids=["integers", "one channel", "channels last", "beyond [0, 1]"],
)
def test_images_of_several_forms_are_shown(images: Tensor, expected: Tensor) -> None:
    (shown,) = images_of(top_examples(images, [1.0]))
    assert shown == pytest.approx(expected.numpy())


def test_images_beyond_the_unit_interval_are_scaled_alike() -> None:
    images = torch.stack([torch.full((2, 2), 4.0), torch.full((2, 2), 2.0)])
    shown = images_of(top_examples(images, [2.0, 1.0], test_image=torch.zeros(2, 2)))
    assert [float(image.mean()) for image in shown] == [0.0, 1.0, 0.5]


def test_images_that_are_not_shown_are_not_looked_at() -> None:
    images = torch.zeros(3, 2, 2)
    images[2] = torch.nan
    assert len(top_examples(images, [1.0, -1.0, 0.0]).images) == 2


def test_more_than_five_images_go_to_the_next_line() -> None:
    axes = top_examples(torch.rand(12, 4, 4), torch.arange(1.0, 13.0), k=7)
    places = [image.get_extent()[0] for image in axes.images]
    assert places[:2] == pytest.approx(places[5:])
    assert len(set(places)) == 5


def test_a_table_has_the_features_of_the_extreme_points() -> None:
    features = torch.tensor([[1.0, 0.25], [2.0, 0.5], [30.0, -0.125]])
    axes = top_rows(
        features,
        torch.tensor([1.0, -2.0, 0.5]),
        names=["age", "height"],
        test_row=[4.0, 1.0],
        labels=[0, 1, 0],
        test_label=0,
        k=1,
    )
    columns: dict[float, list[str]] = {}
    for text in axes.texts:
        columns.setdefault(round(text.get_position()[1], 3), []).append(text.get_text())
    assert [columns[line] for line in sorted(columns)] == [
        ["test", "most helpful", "most harmful"],
        ["score", "", "+1.00", "−2.00"],
        ["label", "0", "0", "1"],
        ["age", "4", "1", "2"],
        ["height", "1.00", "0.25", "0.50"],
    ]
    assert [t.get_text() for t in axes.texts if t.get_fontweight() == "bold"] == [
        "test",
        "most helpful",
        "most harmful",
        "1",
    ]


def test_a_table_counts_the_features_that_it_leaves_out() -> None:
    axes = top_rows(normal(3, 30), normal(3), max_features=4)
    texts = [text.get_text() for text in axes.texts]
    assert "… and 26 more features" in texts
    assert "feature 3" in texts
    assert "feature 4" not in texts


def test_a_table_without_points_says_why() -> None:
    texts = [text.get_text() for text in top_rows(torch.eye(2), torch.zeros(2)).texts]
    assert {"none: no score is positive", "none: no score is negative"} <= set(texts)


# --- scores and estimates ----------------------------------------------------------------


def test_two_scores_are_dots_with_their_rank_correlation() -> None:
    first, second = normal(30), normal(30, seed=2)
    axes = score_comparison(first, second, names=("CG", "EKFAC"), identity=True)
    assert np.asarray(axes.collections[0].get_offsets()) == pytest.approx(
        torch.stack([first, second], dim=1).numpy()
    )
    rho = f"{spearmanr(first, second).statistic:.2f}".replace("-", MINUS)
    assert axes.texts[0].get_text() == f"Spearman's ρ = {rho}, n = 30"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("CG", "EKFAC")


def test_a_constant_score_has_no_rank_correlation() -> None:
    assert "constant" in score_comparison([1, 1], [1, 2]).texts[0].get_text()


def test_zero_lines_are_drawn_only_where_zero_is_among_the_scores() -> None:
    assert len(score_comparison([1, 2], [-1, 2]).lines) == 1


def test_estimates_are_intervals_of_one_and_two_standard_errors() -> None:
    named = {
        "Hutch++": Estimate(10.0, 0.5, 64, "hutch++"),
        "exact": Estimate(torch.tensor(11.0), torch.tensor(0.0), 0, "exact"),
        "one probe": Estimate(9.0, torch.inf, 1, "hutchinson"),
    }
    axes = estimates(named, exact=11.0)
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == [10, 11, 9]
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, False, True]
    bars = [path.vertices[:, 0].tolist() for c in axes.collections for path in c.get_paths()]
    assert bars == [[9, 11], [9.5, 10.5]]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "Hutch++\n64 products",
        "exact\n0 products",
        "one probe\n1 product",
    ]
    assert axes.lines[-1].get_xdata() == [11.0, 11.0]


def test_numbers_are_written_with_common_decimals() -> None:
    assert signed([1234.5, -2.0]) == ["+1234", "−2"]
    assert signed([1e-9, 0.0]) == ["+1.0e−09", "0"]
    assert signed([]) == []
    assert aligned([100.0, 20.0]) == ["100", "20"]
    assert aligned([1e9, -2.0]) == ["1.00e+09", "−2.00e+00"]
