"""Everyday manners: what is printed, shown, logged and warned of, and what editors see."""

from __future__ import annotations

import ast
import inspect
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from html.parser import HTMLParser
from linecache import getline
from pathlib import Path
from types import ModuleType

import pytest
import torch
from printed_cases import ELSEWHERE, Points, every_object, matrix, nested, power_of_two, sum_of
from reference import random_spd
from torch import Tensor, nn

import hessops
from hessops import (
    CgOperator,
    CompositeOperator,
    DiagonalOperator,
    GaussNewtonOperator,
    HessianOperator,
    KfacOperator,
    LissaOperator,
    MatrixOperator,
    MinresOperator,
    NystroemPreconditioner,
    Preconditioner,
    TensorOperator,
    distributed,
    errors,
    estimators,
    functional,
    ihvp,
    influence,
    testing,
)
from hessops.errors import (
    CompileWarning,
    ConvergenceWarning,
    HessopsWarning,
    IndefiniteSketchWarning,
    UncoveredParametersWarning,
    ZeroShiftWarning,
)
from hessops.influence import CgInfluence, DirectInfluence, SequentialInfluenceCalculator
from hessops.printed import Node, Printed, as_html, as_text, described
from hessops.progress import bars_closed_on_error, followed, progress_bar

Call = Callable[[], object]
SOURCES = sorted(Path(hessops.__file__).parent.rglob("*.py"))
TORN = ("object at 0x", "<function", "<lambda>", "<bound", "functools.", "tensor(", " at 0x")


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return every_object(tmp_path_factory.mktemp("printed") / "store")


# --- printed ------------------------------------------------------------------------------


def test_what_is_printed_fits_on_a_screen(objects: dict[str, object]) -> None:
    for name, value in objects.items():
        lines = repr(value).splitlines()
        assert 1 <= len(lines) <= 60, name
        assert max(map(len, lines)) <= 100, (name, repr(value))


def test_no_address_and_no_entries_of_a_tensor_are_printed(objects: dict[str, object]) -> None:
    for name, value in objects.items():
        for text in (repr(value), getattr(value, "_repr_html_", str)()):
            assert not [mark for mark in TORN if mark in text], (name, text)


def test_every_public_kind_is_printed_here(objects: dict[str, object]) -> None:
    public = [getattr(module, n) for module in (hessops, influence) for n in module.__all__]
    kinds = [kind for kind in public if inspect.isclass(kind) and not inspect.isabstract(kind)]
    # What a subclass must define decides whether these can be made.
    unmade = (*ELSEWHERE, TensorOperator, CompositeOperator, hessops.TensorDictOperator)
    enumerations = (influence.BlockMode, influence.InfluenceMode, influence.SecondOrderMode)
    missing = [
        kind.__name__
        for kind in kinds
        if kind not in (*unmade, *enumerations)
        and not any(isinstance(value, kind) for value in objects.values())
    ]
    assert missing == []


def test_operators_say_their_size_dtype_and_device(objects: dict[str, object]) -> None:
    for operator in (o for o in objects.values() if isinstance(o, TensorOperator)):
        dtype = str(operator.dtype).removeprefix("torch.")
        size = f"[{operator.input_size} x {operator.input_size}, {dtype}, {operator.device}]"
        assert size in repr(operator)


def test_a_long_sum_is_cut() -> None:
    lines = repr(sum_of(30)).splitlines()
    assert "├─ … 20 more" in lines
    assert sum(line.startswith(("├─ Scaled", "└─ Scaled")) for line in lines) == 10
    assert "more" not in repr(sum_of(12))


def test_a_deep_tree_is_cut() -> None:
    assert "deeper parts are not shown" in repr(nested(25))
    assert "deeper" not in repr(nested(2))


def test_a_part_that_occurs_twice_is_spelled_out_once() -> None:
    part = matrix().shift(0.5)
    assert repr(part @ part).splitlines() == [
        "ComposedOperator [6 x 6, float64, cpu]",
        "├─ ShiftedOperator(+0.5 I) [6 x 6, float64, cpu]",
        "│  └─ MatrixOperator [6 x 6, float64, cpu]",
        "└─ ShiftedOperator(+0.5 I) [6 x 6, float64, cpu]",
        "   └─ … (as above)",
    ]
    # Of the 2^60 leaves of this one, few are looked at.
    assert len(repr(power_of_two(60)).splitlines()) < 40


def test_a_wide_tree_is_cut_without_looking_at_all_of_it() -> None:
    calls: list[int] = []

    class Wide(Printed):
        def __init__(self, level: int) -> None:
            self.level = level

        def _node(self) -> Node:
            calls.append(self.level)
            return Node("Wide()", parts=[Wide(self.level + 1) for _ in range(12)])

    assert len(repr(Wide(0)).splitlines()) < 200
    assert len(calls) < 200


def test_a_long_line_is_broken_behind_a_comma_and_stays_in_its_branch() -> None:
    settings = ", ".join(f"setting_{i}={i}" for i in range(16))
    text = as_text(Node("Root()", parts=[Node(f"Long({settings})", "6 x 6"), Node("Short()")]))
    lines = text.splitlines()
    assert len(lines) == 5
    assert all(len(line) <= 100 for line in lines)
    assert lines[1].startswith("├─ Long(setting_0=0, setting_1=1,")
    assert [line[:6] for line in lines[2:4]] == ["│     ", "│     "]
    assert " ".join(line.strip("│├─ ") for line in lines[1:4]) == f"Long({settings}) [6 x 6]"
    assert lines[4] == "└─ Short()"


def test_a_solution_says_how_each_right_hand_side_ended() -> None:
    A = DiagonalOperator(torch.logspace(-9, 4, 53, dtype=torch.float64))
    rhs = torch.cat([torch.ones(3, 53), torch.eye(53)[:2]]).double()
    lines = repr(CgOperator(A, maxiter=3).solve(rhs)).splitlines()
    assert lines[0] == "Solution(5 right-hand sides) [5 x 53, float64, cpu]"
    assert lines[1].startswith("├─ 2 converged: at most 1 iteration, relative residual at most ")
    assert lines[2].startswith("├─ 3 max iterations: at most 3 iterations, relative residual at")
    assert lines[3].startswith("│  └─ The iterations ran out before the tolerance was met: raise")
    assert lines[-1] == "└─ 4 applications of the operator"


def test_a_preconditioner_is_part_of_the_tree() -> None:
    recipe = NystroemPreconditioner(rank=3)
    inverse = CgOperator(matrix(), preconditioner=recipe)
    last = "└─ preconditioner=NystroemPreconditioner(rank=3, oversampling=10, adaptive=False)"
    assert repr(inverse).splitlines()[-1] == last
    operator = DiagonalOperator(torch.ones(6, dtype=torch.float64)).shift(1.0).inverse()
    assert repr(CgOperator(matrix(), preconditioner=operator)).splitlines()[2:] == [
        "└─ preconditioner=ClosedFormInverse(regularization=0) [6 x 6, float64, cpu]",
        "   └─ ShiftedOperator(+1 I) [6 x 6, float64, cpu]",
        "      └─ DiagonalOperator [6 x 6, float64, cpu]",
    ]


def test_a_model_says_whether_it_is_fitted() -> None:
    p = Points()
    influence = DirectInfluence(p.model, p.loss, 0.1, second_order_mode="gauss_newton")
    assert repr(influence).endswith("not fitted")
    first, block = repr(influence.fit(p.data)).splitlines()[-2:]
    assert first.endswith("fitted on 20 points")
    assert block == "└─ block 'full': DirectSolveOperator(regularization=0.1) of 53"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(10**6, 2), "tensor (1000000, 2)"),
        (lambda x: x, "a lambda"),
        (nn.CrossEntropyLoss(), "CrossEntropyLoss"),
        (torch.Generator(), "Generator on cpu"),
        (list(range(10**6)), "[0, 1, 2, 3, … 999996 more]"),
        (("a",), "('a')"),
        ({"a": torch.zeros(2)}, "{'a': tensor (2,)}"),
        (object(), "object()"),
        (0.1, "0.1"),
        ("x" * 1000, "'" + "x" * 58 + "…"),
    ],
)
def test_settings_are_described_in_a_few_words(value: object, text: str) -> None:
    assert described(value) == text


# --- in notebooks -------------------------------------------------------------------------


class _Html(HTMLParser):
    """Tags that must be closed in order, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_notebooks_get_a_small_tree_without_scripts_and_colours(objects: dict[str, object]) -> None:
    for name, value in objects.items():
        if not isinstance(value, Printed):
            continue
        source = value._repr_html_()
        page = _Html(source)
        assert not page.open, name
        assert page.tags <= {"div", "span", "details", "summary"}, name
        assert page.attributes <= {"style", "open"}, name
        assert "color" not in source, name
        assert "background" not in source, name
        assert len(source) < 20_000, name


def test_both_forms_show_the_same_tree() -> None:
    operator = CgOperator(sum_of(14).shift(0.5), preconditioner=NystroemPreconditioner())
    labels = [line.strip("│├─└ ") for line in repr(operator).splitlines()]
    page = _Html(operator._repr_html_()).text.replace(" ", "")
    assert page == "".join(labels).replace(" ", "")


def test_what_users_name_is_escaped() -> None:
    page = as_html(Node("<script>alert('a&b')</script>", "<b>", details=["<i>"]))
    assert "<script" not in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;alert(&#x27;a&amp;b&#x27;)" in page


def test_notebooks_list_the_parameters_when_they_are_clicked() -> None:
    space = hessops.ParameterSpace.from_model(nn.Linear(2, 3))
    page = _Html(space._repr_html_())
    assert "weight (3, 2)" in page.text
    assert "open" not in page.attributes
    assert "weight" not in repr(space)


def test_what_says_something_else_of_itself_is_taken_at_its_word() -> None:
    @dataclass(frozen=True)
    class Mine(Preconditioner):
        depth: int = 3

        def fit(
            self, operator: TensorOperator, regularization: float | None = None
        ) -> TensorOperator:
            return operator

    assert "Mine(depth=3)" in repr(Mine())
    assert "Mine(depth=3)" in _Html(Mine()._repr_html_()).text


# --- progress -----------------------------------------------------------------------------


def _stored(p: Points, progress: bool, path: Path) -> object:
    model = CgInfluence(p.model, p.loss, 0.1, second_order_mode="gauss_newton").fit(p.data)
    calculator = SequentialInfluenceCalculator(model, progress=progress)
    calculator.influence_factors(p.data).compute()
    calculator.influence_factors(p.data).to_zarr(path / "factors")
    calculator.influences(p.data, p.data).to_zarr(path / "influences", column_chunk=5)
    return calculator.influences(p.data, p.data).compute()


RUNS: dict[str, Callable[[Points, bool, Path], object]] = {
    "pass": lambda p, progress, _: GaussNewtonOperator(*p.of_model, progress=progress).apply(
        torch.ones(53, dtype=torch.float64)
    ),
    "cg": lambda p, progress, _: CgOperator(p.G, 0.1, progress=progress).solve(
        torch.ones(53, dtype=torch.float64)
    ),
    "minres": lambda p, progress, _: MinresOperator(p.G, 0.1, progress=progress).solve(
        torch.ones(53, dtype=torch.float64)
    ),
    "lissa": lambda p, progress, _: LissaOperator(
        hessops.GaussNewtonBatchOperation(p.model, p.loss),
        p.data,
        regularization=20.0,
        scale="auto",
        maxiter=5,
        progress=progress,
    ).solve(torch.ones(53, dtype=torch.float64)),
    "kfac": lambda p, progress, _: KfacOperator(*p.of_model, progress=progress),
    "calculator": _stored,
}
SHOWN = {
    "pass": ("batches", "2/2", "batch/s"),
    "cg": ("conjugate gradients", "worst_residual", "step/s"),
    "minres": ("minimal residuals", "worst_residual", "step/s"),
    "lissa": ("LiSSA", "largest_update", "5/5"),
    "kfac": ("batches", "decompositions", "factor=", "5/5"),
    "calculator": ("influence factors", "influences", "2/2", "4/4", "8/8", "chunk/s", "batch/s"),
}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_written_unless_progress_is_asked_for(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    RUNS[name](Points(), False, tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", RUNS)
def test_a_bar_says_what_it_counts(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    RUNS[name](Points(), True, tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    assert [text for text in SHOWN[name] if text not in err] == []


def _screen(written: str) -> list[str]:
    """What a terminal shows in the end of lines that are rewritten."""
    rows, row, column = [""], 0, 0
    position = 0
    while position < len(written):
        if written.startswith("\x1b[A", position):
            row, position = max(row - 1, 0), position + 3
            continue
        character = written[position]
        if character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        else:
            line = rows[row].ljust(column)
            rows[row] = line[:column] + character + line[column + 1 :]
            column += 1
        position += 1
    return [line.rstrip() for line in rows if line.strip()]


def test_nested_bars_leave_no_debris(capfd: pytest.CaptureFixture[str]) -> None:
    p = Points()
    A = GaussNewtonOperator(*p.of_model, progress=True, cache=False)
    CgOperator(A, 0.1, progress=True).solve(torch.ones(53, dtype=torch.float64))
    written = capfd.readouterr().err
    assert "batches" in written
    assert "conjugate gradients" in written
    assert _screen(written) == []


def test_only_the_outermost_bar_of_a_long_run_stays(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        progress_bar("outer", "part", 2, show=True, keep=True) as outer,
        progress_bar("inner", "part", 3, show=True, keep=True) as inner,
    ):
        inner.advance(3)
        outer.advance(2)
    (line,) = _screen(capfd.readouterr().err)
    assert line.startswith("outer: 100%")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_bars_are_closed_by_an_error(
    error: type[BaseException], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = Points()
    A = GaussNewtonOperator(*p.of_model, progress=True, cache=False)
    A.check_data()
    count = iter(range(100))
    add_rows = type(A.batch_operation).add_rows

    def failing(self: object, *arguments: object) -> None:
        if next(count) == 5:
            raise error("stop")
        add_rows(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(type(A.batch_operation), "add_rows", failing)
    with pytest.raises(error) as caught:
        CgOperator(A, 0.1, progress=True).solve(torch.ones(53, dtype=torch.float64))
    # The traceback, which holds the generators of the pass, is alive.
    assert caught.tb is not None
    assert _screen(capfd.readouterr().err) == []
    with progress_bar("next", "part", 1, show=True, keep=True) as bar:
        bar.advance()
    (line,) = _screen(capfd.readouterr().err)
    assert line.startswith("next")


def test_an_error_closes_its_own_bars_only(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("outer", "part", 2, show=True, keep=True) as outer:
        inside = iter(followed([1, 2, 3], "inner", "part", 3, show=True))
        with suppress(ValueError), bars_closed_on_error():
            next(inside)
            raise ValueError("stop")
        outer.advance(2)
    (line,) = _screen(capfd.readouterr().err)
    assert line.startswith("outer: 100%")


IN_A_NOTEBOOK = """
import sys, types, warnings, logging
import hessops, hessops.influence
assert "tqdm.auto" not in sys.modules, "tqdm is imported before anybody asks for a bar"
assert logging.getLogger().handlers == []
(handler,) = logging.getLogger("hessops").handlers
assert isinstance(handler, logging.NullHandler)
assert logging.getLogger("hessops").level == logging.NOTSET
shell = types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: shell)
sys.modules["ipykernel.zmqshell"] = types.ModuleType("zmqshell")  # by which tqdm knows a kernel
sys.modules["ipywidgets"] = None
warnings.simplefilter("always")
from hessops.progress import progress_bar
with progress_bar("steps", "step", 2, show=True) as bar:
    bar.advance(2)
"""


def test_a_notebook_without_widgets_gets_a_bar_of_text_and_no_warning() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", IN_A_NOTEBOOK], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "steps: 100%" in finished.stderr
    assert "Warning" not in finished.stderr
    assert finished.stdout == ""


# --- logging ------------------------------------------------------------------------------


def _name_of(function: ast.expr) -> str:
    """``a`` or ``a.b`` for these, and nothing for what is no such name."""
    match function:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            return f"{owner}.{name}"
    return ""


@cache
def _calls(path: Path) -> list[tuple[str, ast.Call]]:
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return [(_name_of(node.func), node) for node in nodes if isinstance(node, ast.Call)]


def test_the_library_never_prints_and_never_configures_logging() -> None:
    refused = {"print", "logging.basicConfig", "logging.info", "logging.debug", "logging.warning"}
    refused |= {"stderr.write", "stdout.write", "logging.error", "logger.setLevel"}
    found = [(path.name, name) for path in SOURCES for name, _ in _calls(path) if name in refused]
    assert found == []


def test_loggers_are_named_by_module_and_format_when_somebody_reads() -> None:
    for path in SOURCES:
        for name, call in _calls(path):
            if name == "logging.getLogger":
                assert ast.unparse(call) == "logging.getLogger(__name__)", path
            if name.startswith("logger.") and name != "logger.isEnabledFor":
                assert isinstance(call.args[0], ast.Constant), (path, ast.unparse(call))


def test_a_long_run_is_logged_at_info_and_decisions_at_debug(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.DEBUG, logger="hessops"):
        _stored(Points(), False, tmp_path)
        KfacOperator(*Points().of_model)
        CgOperator(Points().G, 0.1, preconditioner=NystroemPreconditioner()).solve(
            torch.ones(53, dtype=torch.float64)
        )
    said = {
        level: " | ".join(r.getMessage() for r in caplog.records if r.levelname == level)
        for level in ("INFO", "DEBUG")
    }
    for text in ("CgInfluence is fitted: 20 points, 53 parameters, 1 block", "3 blocks", "0 of 8"):
        assert text in said["INFO"]
    for text in ("2 batches are kept", "graphs retained", "fitted Nystroem", "CgOperator.solve: 1"):
        assert text in said["DEBUG"]
    names = {record.name for record in caplog.records}
    assert "hessops.operators.inverse" in names
    assert all(name.startswith("hessops.") for name in names)


def test_nothing_is_computed_for_messages_that_nobody_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hessops.Solution, "report", lambda self: pytest.fail("was formatted"))
    assert not logging.getLogger("hessops").isEnabledFor(logging.DEBUG)
    CgOperator(matrix(), warn_on_max_iteration=False).solve(torch.ones(6, dtype=torch.float64))


# --- warnings -----------------------------------------------------------------------------


def _steep() -> MatrixOperator:
    return MatrixOperator(torch.diag(torch.logspace(-9, 3, 12, dtype=torch.float64)))


def _indefinite() -> MatrixOperator:
    return MatrixOperator(torch.diag(torch.linspace(-1, 1, 12, dtype=torch.float64)))


def _rhs(*shape: int) -> Tensor:
    return torch.ones(*shape, 12, dtype=torch.float64)


def _short() -> CgOperator:
    return CgOperator(_steep(), maxiter=2)


def _fitted() -> tuple[CgInfluence, Points]:
    p = Points()
    few = CgInfluence(p.model, p.loss, 1e-6, second_order_mode="gauss_newton", maxiter=2)
    return few.fit(p.data), p


def _influences() -> Call:
    model, p = _fitted()
    return partial(model.influences, p.x, p.y)


def _compute() -> Call:
    model, p = _fitted()
    return SequentialInfluenceCalculator(model).influences(p.data, p.data).compute


def _spectral() -> Call:
    A = MatrixOperator(torch.diag(1 - 1e-4 * torch.arange(400, dtype=torch.float64)))
    return partial(functional.operator_spectral_approximation, A, 10, max_iter=1)


def _stagnating() -> Call:
    hard = random_spd(30, 1e6).float()
    solve = ihvp.ihvp_at_x_cg(lambda x: x @ hard @ x / 2, torch.zeros(30), max_iter=5000, tol=0.0)
    return partial(solve, torch.ones(30))


def _diverging() -> Call:
    points = torch.ones(4, 1)
    settings = {"recursion_depth": 20, "scaling": 0.6, "in_dims": (None, 0)}
    solve = ihvp.ihvp_at_x_lissa(
        lambda w, x: ((x * w) ** 2).mean(), torch.ones(1), points, **settings
    )
    return partial(solve, torch.ones(1))


def _leaving_out() -> Call:
    model = Points().model
    blocks = {"first": ["0.weight"]}
    return partial(DirectInfluence, model, nn.CrossEntropyLoss(), 0.1, blocks)


def _uncompiled() -> Call:
    p = Points()
    A = HessianOperator(*p.of_model, compile=True)
    return partial(A.apply, torch.ones(53, dtype=torch.float64))


NYSTROEM = NystroemPreconditioner(rank=5)
WARNED: dict[str, tuple[type[HessopsWarning], Callable[[], Call]]] = {
    "apply": (ConvergenceWarning, lambda: partial(_short().apply, _rhs())),
    "matmul": (ConvergenceWarning, lambda: partial(_short().__matmul__, _rhs(2).T)),
    "composite": (ConvergenceWarning, lambda: partial((2 * _short() + _steep()).apply, _rhs())),
    "scipy": (ConvergenceWarning, lambda: partial(_short().to_scipy().matvec, _rhs().numpy())),
    "influences": (ConvergenceWarning, _influences),
    "calculator": (ConvergenceWarning, _compute),
    "eigenpairs": (ConvergenceWarning, _spectral),
    "function by cg": (ConvergenceWarning, _stagnating),
    "function by lissa": (ConvergenceWarning, _diverging),
    "sketch": (
        IndefiniteSketchWarning,
        lambda: partial(functional.operator_nystroem_approximation, _indefinite(), 6),
    ),
    "preconditioner": (
        IndefiniteSketchWarning,
        lambda: partial(NYSTROEM.fit, _indefinite(), 0.1),
    ),
    "no shift": (ZeroShiftWarning, lambda: partial(NYSTROEM.fit, _steep())),
    "no shift any more": (
        ZeroShiftWarning,
        lambda: partial(CgOperator(_steep(), preconditioner=NYSTROEM).solve, _rhs()),
    ),
    "uncovered": (UncoveredParametersWarning, _leaving_out),
    "compiled": (CompileWarning, _uncompiled),
}


@pytest.mark.parametrize("name", WARNED)
def test_a_warning_points_at_the_line_of_the_caller(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(graph: object, **_: object) -> object:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", refusing)
    category, prepare = WARNED[name]
    call = prepare()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()  # the line of the caller
    assert caught
    for warning in caught:
        assert warning.category is category
        assert warning.filename == __file__
        assert "# the line of the caller" in getline(warning.filename, warning.lineno)


def test_every_warning_of_the_library_has_a_category_and_a_documented_place() -> None:
    for path in SOURCES:
        names = [name for name, _ in _calls(path) if name == "warnings.warn"]
        assert names == [] or path.name == "warn.py", path
        for name, call in _calls(path):
            if name == "warn":
                category = getattr(errors, ast.unparse(call.args[1]))
                assert issubclass(category, HessopsWarning)
    kinds = [k for k in vars(errors).values() if inspect.isclass(k) and issubclass(k, Warning)]
    assert len(kinds) == 6
    for kind in kinds:
        assert issubclass(kind, HessopsWarning)
        assert kind.__name__ in (errors.__doc__ or "")


def test_one_filter_silences_all_or_one_kind() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ConvergenceWarning)
        _short().apply(_rhs())
        with pytest.raises(ZeroShiftWarning):
            NYSTROEM.fit(_steep())
        warnings.simplefilter("ignore", HessopsWarning)
        NYSTROEM.fit(_steep())


def test_what_torch_says_of_its_own_vectorised_loops_is_not_passed_on() -> None:
    points = hessops.Batch.from_raw((torch.randn(5, 4), torch.randint(3, (5,))))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hessops.Objective(nn.Linear(4, 3), nn.MultiMarginLoss()).check(points)
    assert [str(warning.message) for warning in caught] == []


# --- editors ------------------------------------------------------------------------------

MODULES = (hessops, influence, functional, ihvp, errors, testing, estimators, distributed)


def _public(module: ModuleType) -> dict[str, object]:
    names = getattr(module, "__all__", [name for name in vars(module) if name[0] != "_"])
    every = {name: getattr(module, name) for name in names}
    return {
        name: value
        for name, value in every.items()
        if callable(value) and getattr(value, "__module__", "").startswith("hessops")
    }


def _is_open(callable_: object) -> bool:
    """Whether a signature hides names of arguments."""
    assert callable(callable_)
    parameters = inspect.signature(callable_).parameters.values()
    return any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def test_signatures_show_the_names_of_all_arguments() -> None:
    hidden = []
    for module in MODULES:
        for name, value in _public(module).items():
            if inspect.isclass(value):
                if issubclass(value, Exception) or value.__module__ == "typing":
                    continue
                methods = inspect.getmembers(value, inspect.isfunction)
                hidden += [
                    f"{name}.{method}"
                    for method, function in methods
                    if method[0] != "_" and _is_open(function)
                ]
                if getattr(value, "_is_protocol", False):
                    continue
            if _is_open(value):
                hidden.append(name)
    # Their arguments are those of the function, however many it has.
    assert sorted(set(hidden)) == [
        "ihvp_at_x_arnoldi",
        "ihvp_at_x_cg",
        "ihvp_at_x_explicit",
        "ihvp_at_x_lissa",
    ]


def test_common_keywords_of_influence_models_are_spelled_out() -> None:
    parameters = inspect.signature(CgInfluence).parameters
    assert list(parameters)[:2] == ["model", "loss"]
    for name in ("reduction", "unpack", "cache", "averaging", "generator"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["reduction"].default == "mean"


def test_a_subclass_shows_its_own_arguments() -> None:
    class Doubling(TensorOperator):
        def _apply_rows(self, rows: Tensor) -> Tensor:
            return 2 * rows

    assert list(inspect.signature(Doubling).parameters)[:3] == ["input_size", "dtype", "device"]


def test_dir_lists_what_is_public_and_nothing_else() -> None:
    listed = {name for name in dir(hessops) if not name.startswith("__")}
    modules = {n for n in listed if inspect.ismodule(getattr(hessops, n))}
    assert listed - modules == set(hessops.__all__) - modules
    assert {"influence", "functional", "ihvp", "distributed", "errors"} <= modules
    assert not modules & {"warn", "printed", "progress", "isolation", "operators", "batch"}


def test_all_names_are_there_sorted_and_once() -> None:
    for module in (hessops, influence, functional, hessops.operators, hessops.solvers):
        assert all(hasattr(module, name) for name in module.__all__)
        assert len(set(module.__all__)) == len(module.__all__)
    assert (Path(hessops.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("kind", [HessianOperator, KfacOperator])
def test_a_move_keeps_the_kind_of_an_operator(kind: type[TensorOperator]) -> None:
    p = Points()
    assert type(kind(*p.of_model).to("meta")) is kind  # type: ignore[call-arg]  # of a curvature
    for operator in (nested(2), sum_of(3), matrix().shift(1.0).inverse(), _short()):
        assert type(operator.to("meta")) is type(operator)
