"""The page of an influence run: what it says, what it refuses, and what a browser makes of it."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import NAMES, VARIABLE, browser_path, opened_browser
from example_scripts import loaded
from torch import nn

from hessops import SolveStatus
from hessops.errors import HessopsError
from hessops.influence import CgInfluence, DirectInfluence, SequentialInfluenceCalculator
from hessops.reporting import report
from hessops.reporting.chunks import PIECE
from hessops.reporting.figures import histogram_figure
from hessops.reporting.images import MOST_PIXELS, as_image, image_element
from hessops.reporting.markup import VOID, element, escaped
from hessops.reporting.summary import magnitude_edges, summarised

EVIL = "<script>alert('x')</script><img src=x onerror=\"alert(1)\">&amp;"


class Page(HTMLParser):
    """The tags and the text of a page whose elements are properly nested."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def attributes(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]


class Counted:
    """An array that is nowhere as a whole, and counts what is read of it."""

    def __init__(self, shape: tuple[int, int], chunks: tuple[int, int] | None = None) -> None:
        self.shape, self.chunks = shape, chunks
        self.reads = np.zeros(shape, np.uint8)
        self.largest = 0

    def values(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.sin(rows[:, None] * 7919.0 + columns) * 10.0 ** (columns % 5)

    def __getitem__(self, where: tuple[slice, slice]) -> np.ndarray:
        self.reads[where] += 1
        read = self.values(*(np.arange(s.start, s.stop) for s in where))
        self.largest = max(self.largest, read.size)
        return read

    def dense(self) -> np.ndarray:
        return self.values(*map(np.arange, self.shape))


class Run:
    """A fitted model of a linear layer, and the influences of 12 points on 4."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x, self.y = torch.randn(12, 3).double(), torch.randn(12, 1).double()
        self.test = (self.x[:4] + 0.1, self.y[:4])
        self.model = CgInfluence(nn.Linear(3, 1).double(), nn.MSELoss(), 0.1)
        self.model.fit([(self.x, self.y)])
        gradients = self.model.gradient_provider.flat_grads(*self.test)
        self.solution = self.model.inverses["full"].solve(gradients, history=True)
        factors = self.solution.value
        self.scores = self.model.influences_from_factors(factors, self.x, self.y)


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


@pytest.fixture
def without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without what takes the time, for tests of all the rest."""
    monkeypatch.setattr("hessops.reporting.figures._drawn", lambda *_: b"")


# --- what the page says ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A page with everything on it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("drawn") / "run.html"
    written = report(
        path,
        run.scores,
        model=run.model,
        solutions=run.solution,
        train=(run.x, run.y),
        test=run.test,
        feature_names=["width", "height", "depth"],
        settings={"Data": "drawn at random"},
        title="Twelve points",
    )
    assert written == path
    return Page(path)


def test_the_page_says_what_was_run_and_how_it_ended(run: Run, drawn: Page) -> None:
    page = drawn
    for said in (
        "Twelve points",
        "CgInfluence: 12 training points on 4 test points",
        "Nothing failed All 4 right-hand sides met their tolerance. All 48 scores are finite.",
        "Positive is helpful, negative is harmful : leaving the training point out changes the "
        "loss on the test point by about score ÷ N, with N = 12 training points.",
        "Data drawn at random",
        "Linear, 4 parameters",
        "MSELoss()",
        "Curvature hessian",
        "float64, cpu",
        "Seed 0, of torch when this page was written",
        f"torch {torch.__version__}",
        f"numpy {np.__version__}",
        "rtol",
        "CgOperator(regularization=0.1",
        "width",
        "depth",
    ):
        assert said in page.text, said
    for row in range(4):
        residual = f"{float(run.solution.residual_norms[row]):.2e}".replace("-", "−")
        tolerance = f"{float(run.solution.tolerances[row]):.2e}".replace("-", "−")
        steps = int(run.solution.iterations[row])
        assert f"{row} converged {steps} {residual} {tolerance}" in page.text
    best = int(run.scores[2].argmax())
    change = float(run.scores[2, best]) / 12
    assert f"helpful #{best} " in page.text
    assert f"+{change:#.3g}" in page.text
    assert ("html", {"lang": "en"}) in page.tags
    assert all(page.attributes("alt"))


def test_the_page_loads_nothing_and_forbids_to(drawn: Page) -> None:
    page = drawn
    sources = [*page.attributes("src"), *page.attributes("srcset"), *page.attributes("href")]
    assert len(page.attributes("src")) == 3  # convergence, histogram, heat map
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert {"script", "iframe", "object", "style"} & {tag for tag, _ in page.tags} == {"style"}
    assert not re.search(r"https?://|url\(|@import|@font-face", page.source)
    (policy,) = (
        a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")


@pytest.mark.usefixtures("without_drawing")
def test_right_hand_sides_that_did_not_converge_stand_at_the_top(run: Run, tmp_path: Path) -> None:
    solution = CgInfluence(run.model.model, nn.MSELoss(), 1e-9, maxiter=1)
    solution.fit([(run.x, run.y)])
    gradients = run.model.gradient_provider.flat_grads(*run.test)
    failed = solution.inverses["full"].solve(gradients, history=True)
    mixed = replace(
        failed,
        status=(SolveStatus.CONVERGED, *failed.status[1:3], SolveStatus.CONVERGED),
        residual_norms=torch.cat([failed.tolerances[:1] / 2, failed.residual_norms[1:]]),
    )
    page = Page(report(tmp_path / "run.html", run.scores, solutions=mixed))
    head, rest = page.text.split("One linear system", 1)
    assert "Read this first" in head
    assert "2 of 4 right-hand sides: max iterations." in head
    assert "Test points 1, 2." in head
    assert "raise maxiter" in head
    # A status is not believed where the residual says otherwise.
    assert "1 of 4 right-hand sides: said to have converged, residual above tolerance." in head
    assert "Nothing failed" not in page.text
    assert "1 of 4 right-hand sides met the tolerance" in rest
    order = re.findall(r"tbody.*?</tbody>", page.source, re.DOTALL)[0]
    assert re.findall(r'<th scope="row">(\d)</th>', order) == ["1", "2", "3", "0"]
    assert rest.count("solve: max iterations") == 2  # beside their examples, too


@pytest.mark.usefixtures("without_drawing")
def test_scores_that_are_not_finite_stand_at_the_top_and_nowhere_else(
    run: Run, tmp_path: Path
) -> None:
    scores = run.scores.clone()
    scores[1, 3], scores[1, 5], scores[3, 0] = torch.nan, torch.inf, -torch.inf
    page = Page(report(tmp_path / "run.html", scores, solutions=run.solution))
    head, rest = page.text.split("One linear system", 1)
    assert "3 of 48 scores are NaN or infinite. Test points 1, 3." in head
    assert "NaN or infinite 3 (6.2%)" in rest
    assert "2 scores not finite" in rest
    finite = scores[scores.isfinite()]
    assert f"Mean {float(finite.mean()):+#.4g}".replace("-", "−") in rest
    assert "Grey cells" in rest
    assert "inf" not in re.sub(r"infinite|influence", "", rest.lower())


def test_a_page_of_scores_that_are_all_nan_or_zero_says_so(tmp_path: Path) -> None:
    page = Page(report(tmp_path / "nan.html", torch.full((2, 3), torch.nan)))
    assert "6 of 6 scores are NaN" in page.text
    assert "Mean" not in page.text
    page = Page(report(tmp_path / "zero.html", torch.zeros(2, 3)))
    assert "Zero 6 (100.0%)" in page.text
    assert page.text.count("No training point has a positive influence.") == 2


@pytest.mark.usefixtures("without_drawing")
def test_what_is_not_known_of_solves_is_not_called_success(run: Run, tmp_path: Path) -> None:
    direct = DirectInfluence(run.model.model, nn.MSELoss(), 0.1).fit([(run.x, run.y)])
    cases = ((run.model, "The inverse is iterative and no outcomes", True), (direct, "", False))
    for model, said, is_failure in (*cases, (None, "nothing is known of the inverse", False)):
        page = Page(report(tmp_path / "run.html", run.scores, model=model))
        assert said in page.text
        assert ("Read this first" in page.text) is is_failure
        assert "Nothing failed" not in page.text


@pytest.mark.usefixtures("without_drawing")
def test_blocks_have_their_own_outcomes(run: Run, tmp_path: Path) -> None:
    model = CgInfluence(
        run.model.model, nn.MSELoss(), 0.1, block_structure="parameter_wise", maxiter=1
    ).fit([(run.x, run.y)])
    gradients = model.fitted.gradients_by_block(*run.test)
    solutions = {name: model.inverses[name].solve(gradients[name]) for name in gradients}
    path = report(tmp_path / "run.html", run.scores, model=model, solutions=solutions)
    text = Page(path).text
    assert "4 of 4 right-hand sides of block 'weight': max iterations." in text
    assert "4 of 4 right-hand sides of block 'bias' met the tolerance." in text


# --- text of others -------------------------------------------------------------------------


@pytest.mark.usefixtures("without_drawing")
def test_text_of_others_is_escaped_wherever_it_stands(run: Run, tmp_path: Path) -> None:
    class Layer(nn.Linear):
        def extra_repr(self) -> str:
            return EVIL

    blocks = {EVIL: ["weight", "bias"]}
    model = CgInfluence(Layer(3, 1).double(), nn.MSELoss(), 0.1, block_structure=blocks)
    model.fit([(run.x, run.y)])
    solution = model.inverses[EVIL].solve(model.fitted.gradients_by_block(*run.test)[EVIL])
    tabular = report(
        tmp_path / "rows.html",
        run.scores,
        model=model,
        solutions={EVIL: replace(solution, detail=EVIL)},
        train=(run.x, run.y),
        test=run.test,
        describe=lambda x, y: EVIL,
        feature_names=[EVIL] * 3,
        settings={EVIL: EVIL},
        title=EVIL,
    )
    texts = report(tmp_path / "texts.html", run.scores, train=([EVIL] * 12, [EVIL] * 12))
    for path, least in ((tabular, 50), (texts, 20)):
        page = Page(path)
        assert "script" not in {tag for tag, _ in page.tags}
        assert not page.attributes("onerror")
        assert page.source.count("&lt;script&gt;") >= least
        assert page.text.count(EVIL) >= least


def test_what_html_cannot_hold_is_replaced() -> None:
    assert escaped("a\x00b\ud800c\td") == "a\ufffdb\ufffdc\td"
    assert element("p", "x" * 3, title='"><script>') == (
        '<p title="&quot;&gt;&lt;script&gt;">xxx</p>'
    )


# --- the file -------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_drawing")
def test_a_page_that_cannot_be_made_leaves_the_earlier_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.html"
    path.write_text("earlier")

    def describe(x: object, y: object) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report(path, run.scores, train=(run.x, run.y), describe=describe)

    def full(_: int) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError, match="no space"):
            report(path, run.scores)
    assert path.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["run.html"]
    report(path, run.scores)
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert [file.name for file in tmp_path.iterdir()] == ["run.html"]


def test_without_matplotlib_the_error_names_the_extra(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"hessops\[plot\]"):
        report(tmp_path / "run.html", run.scores)
    assert not list(tmp_path.iterdir())


def test_figures_and_settings_of_the_session_are_left_alone(run: Run) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot

    summary = summarised(run.scores, [], 1)
    with mpl.rc_context({"axes.labelsize": 3.0, "xtick.direction": "in"}):
        before, figures = dict(mpl.rcParams), pyplot.get_fignums()
        one = histogram_figure(summary)
        assert dict(mpl.rcParams) == before
        assert pyplot.get_fignums() == figures
    assert one == histogram_figure(summary)


# --- what is refused ------------------------------------------------------------------------

UNFITTED = CgInfluence(nn.Linear(3, 1), nn.MSELoss(), 0.1)
REFUSED = {
    "no array": ({"scores": [[1.0]]}, TypeError, "scores must be an array"),
    "one dimension": ({"scores": torch.ones(3)}, ValueError, r"pass scores\[None\]"),
    "three dimensions": ({"scores": torch.ones(3, 2, 2)}, ValueError, "mode UP"),
    "no test points": ({"scores": torch.ones(0, 3)}, ValueError, "nothing to report"),
    "no training points": ({"scores": torch.ones(3, 0)}, ValueError, "nothing to report"),
    "masked": ({"scores": np.ma.masked_array(np.ones((4, 12)))}, TypeError, "mask"),
    "complex": ({"scores": torch.ones(4, 12, dtype=torch.complex64)}, TypeError, "real numbers"),
    "words": ({"scores": np.full((4, 12), "a")}, TypeError, "real numbers"),
    "network": ({"model": nn.Linear(3, 1)}, TypeError, "InfluenceFunctionModel"),
    "unfitted": ({"model": UNFITTED}, RuntimeError, "fit"),
    "factors": ({"solutions": torch.ones(4, 4)}, TypeError, "must be a Solution"),
    "no solutions": ({"solutions": {}}, ValueError, "empty mapping"),
    "loader": ({"train": torch.utils.data.DataLoader([1])}, TypeError, "pass its dataset"),
    "iterator": ({"train": iter([])}, TypeError, "pair of arrays"),
    "three parts": ({"train": (1, 2, 3)}, TypeError, r"pair \(x, y\)"),
    "other train": ({"train": (torch.ones(5, 3), None)}, ValueError, "train has 5 points"),
    "other test": ({"test": (torch.ones(4, 3), torch.ones(3))}, ValueError, "test has 3 points"),
    "no pairs": ({"test": torch.ones(4, 3)}, TypeError, r"test\[0\] must be a pair"),
    "no function": ({"images": "yes"}, TypeError, "images must be"),
    "no image": ({"test": (torch.ones(4, 3), None), "images": True}, ValueError, "is no image"),
    "names": (
        {"test": (torch.ones(4, 3), None), "feature_names": ["a"]},
        ValueError,
        "feature_names has 1 names",
    ),
    "top": ({"top": 0}, ValueError, "top must be >= 1"),
    "point": ({"test_points": [4]}, ValueError, "names point 4"),
    "negative": ({"test_points": [-1]}, ValueError, "test_points must be >= 0"),
    "twice": ({"test_points": [1, 1]}, ValueError, "twice"),
    "no numbers": ({"test_points": "all"}, TypeError, "test_points"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    arguments, error, message = REFUSED[case]
    scores = arguments.get("scores", torch.ones(4, 12))
    others = {name: value for name, value in arguments.items() if name != "scores"}
    with pytest.raises(error, match=message) as raised:
        report(tmp_path / "run.html", scores, **others)
    assert isinstance(raised.value, HessopsError)
    assert not list(tmp_path.iterdir())


def test_solutions_are_those_of_the_scores_and_of_the_model(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    with pytest.raises(ValueError, match="4 right-hand sides, scores are of 3"):
        report(path, run.scores[:3], solutions=run.solution)
    with pytest.raises(ValueError, match=r"blocks \['other'\], the model \['full'\]"):
        report(path, run.scores, model=run.model, solutions={"other": run.solution})
    with pytest.raises(ValueError, match="of 3 parameters, the model has 4"):
        report(
            path,
            run.scores,
            model=run.model,
            solutions=replace(run.solution, value=run.solution.value[:, :3]),
        )


def test_a_place_that_cannot_be_written_is_refused_before_scores_are_read(tmp_path: Path) -> None:
    scores = Counted((2, 3))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report(tmp_path / "no" / "run.html", scores)
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        report(tmp_path, scores)
    with pytest.raises(TypeError, match="path"):
        report(3, scores)  # type: ignore[arg-type]
    assert not scores.reads.any()


# --- scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((700, 2000), None), ((2, 1_100_000), None), ((1000, 2100), (300, 512)), ((5, 7), (2, 3))],
)
def test_scores_are_read_once_in_pieces(
    shape: tuple[int, int], chunks: tuple[int, int] | None
) -> None:
    scores = Counted(shape, chunks)
    chosen = [0, shape[0] - 1]
    summary = summarised(scores, chosen, 2)
    assert (scores.reads == 1).all()
    assert scores.largest <= PIECE
    dense = scores.dense()
    assert summary.mean == pytest.approx(dense.mean(), rel=1e-9, abs=1e-9)
    assert summary.deviation == pytest.approx(dense.std(), rel=1e-12)
    assert (summary.smallest, summary.largest) == (dense.min(), dense.max())
    assert summary.num_positive == (dense > 0).sum()
    assert summary.num_negative == (dense < 0).sum()
    for point in chosen:
        order = dense[point].argsort(kind="stable")
        assert summary.harmful[point].indices.tolist() == order[:2].tolist()
        assert summary.helpful[point].values.tolist() == dense[point, order[::-1][:2]].tolist()


def test_chunks_of_a_store_are_read_whole() -> None:
    class Aligned(Counted):
        def __getitem__(self, where: tuple[slice, slice]) -> np.ndarray:
            for part, size, total in zip(where, self.chunks, self.shape, strict=True):
                assert part.start % size == 0
                assert part.stop % size == 0 or part.stop == total
            return super().__getitem__(where)

    scores = Aligned((1000, 2100), (300, 512))
    summarised(scores, [0], 1)
    assert (scores.reads == 1).all()


def test_bins_and_cells_are_those_of_all_scores() -> None:
    scores = Counted((250, 700), (37, 111))
    summary, dense = summarised(scores, [], 1), scores.dense()
    edges = 10 ** magnitude_edges()[7000:9000]
    for bins, values in ((summary.helpful_bins, dense), (summary.harmful_bins, -dense)):
        expected = np.histogram(values[values > 0], edges)[0]
        assert (bins[7000:8999] == expected).all()
        assert bins.sum() == expected.sum()
    rows, columns = summary.cells.shape
    of_row, of_column = np.arange(250) * rows // 250, np.arange(700) * columns // 700
    for row, column in ((0, 0), (17, 200), (rows - 1, columns - 1)):
        block = dense[np.ix_(of_row == row, of_column == column)].ravel()
        assert summary.cells[row, column] == block[np.abs(block).argmax()]


def test_only_finite_scores_of_the_right_sign_are_extreme_and_ties_go_to_the_earlier() -> None:
    scores = np.array([[2.0, np.nan, 2.0, -1.0, np.inf, 0.0, 3.0, -np.inf, 2.0]])
    summary = summarised(scores, [0], 3)
    assert summary.helpful[0].indices.tolist() == [6, 0, 2]
    assert summary.harmful[0].indices.tolist() == [3]
    assert summary.num_non_finite == 3
    assert np.isnan(summary.cells[0, [1, 4, 7]]).all()


@pytest.mark.usefixtures("without_drawing")
def test_scores_may_come_from_a_calculator_or_a_store(run: Run, tmp_path: Path) -> None:
    loader = [(run.x[:5], run.y[:5]), (run.x[5:], run.y[5:])]
    tests = [tuple(part[:3] for part in run.test), tuple(part[3:] for part in run.test)]
    lazy = SequentialInfluenceCalculator(run.model).influences(tests, loader)
    stored = lazy.to_zarr(tmp_path / "scores", column_chunk=5)
    expected = summarised(lazy.compute(), [0, 3], 2)
    for scores in (lazy, stored, stored[:], np.asarray(stored[:], order="F")):
        found = summarised(scores, [0, 3], 2)
        assert found.mean == pytest.approx(expected.mean)
        assert found.helpful[3].indices.tolist() == expected.helpful[3].indices.tolist()
    assert Page(report(tmp_path / "run.html", stored)).text.count("Test point ") == 4


# --- images and other inputs ----------------------------------------------------------------


def pixels_of(image: str) -> np.ndarray:
    import base64

    from matplotlib.image import imread

    encoded = re.search('base64,([^&"]*)', image)[1]
    return imread(BytesIO(base64.b64decode(encoded)), format="png")[..., :3]


def test_images_are_shown_as_they_are_whatever_their_form() -> None:
    colours = torch.rand(3, 6, 5)
    for value in (colours, colours.permute(1, 2, 0).numpy()):
        shown = pixels_of(image_element(as_image(value, "it"), 0, 1, "it"))
        assert np.abs(shown - colours.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    grey = torch.arange(6).reshape(2, 3)
    shown = pixels_of(image_element(as_image(grey, "it"), 0, 5, "it"))
    assert np.allclose(shown, (grey / 5).unsqueeze(2).expand(2, 3, 3), atol=0.5 / 255)
    as_bytes = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    assert np.allclose(
        pixels_of(image_element(as_image(as_bytes, ""), 0, 1, ""))[0, :, 0] * 5, [0, 1, 5]
    )
    large = torch.zeros(1, 1000, 500)
    large[:, :500] = 1
    shown = pixels_of(image_element(as_image(large, "it"), 0, 1, "it"))
    assert shown.shape == (MOST_PIXELS, MOST_PIXELS // 2, 3)
    assert shown.mean() == pytest.approx(0.5)


def test_an_image_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        as_image(torch.full((2, 2), torch.nan), "the image of test point 3")
    for value in (torch.ones(5), torch.ones(2, 4, 5), torch.ones(0, 3), torch.ones(1, 1, 2, 2)):
        with pytest.raises(ValueError, match="test point 3 is no image"):
            as_image(value, "the image of test point 3")


@pytest.mark.usefixtures("without_drawing")
def test_only_points_that_are_shown_are_read(run: Run, tmp_path: Path) -> None:
    class Points(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.read: list[int] = []

        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> tuple[str, int]:
            self.read.append(index)
            return f"text number {index}", index

    points = Points()
    text = Page(
        report(tmp_path / "run.html", run.scores, train=points, test_points=[2], top=1)
    ).text
    extremes = [int(run.scores[2].argmax()), int(run.scores[2].argmin())]
    assert points.read == extremes
    assert "1 of 4 test points" in text
    assert all(f"text number {index}" in text for index in extremes)


# --- in a browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    if browser_path() is None:
        pytest.skip(f"no browser found ({', '.join(NAMES)}); {VARIABLE} names and demands one")
    with opened_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory):
    example = loaded("influence_digits")
    digits = example.split_digits(150, seed=0)
    model = example.train(example.untrained(seed=0), digits, torch.ones(150), max_iter=30)
    torch.manual_seed(0)
    found = example.attribute(model, digits, example.ten_test_images(model, digits), rank=40)
    path = tmp_path_factory.mktemp("digits") / "digits.html"
    example.write_page(path, model, digits, found, seed=0)
    return path, found


@pytest.mark.browser
def test_a_browser_shows_the_digits_without_a_request_or_a_complaint(browser, digits) -> None:
    path, found = digits
    for width, dark in ((1280, False), (390, True)):
        browser.show(path, width=width, dark=dark)
        text = browser.evaluate("document.body.innerText")
        assert "Which training images decide?" in text
        assert "All 10 right-hand sides met their tolerance. All 1,500 scores are finite." in text
        residuals = [f"{r:.2e}".replace("-", "−") for r in found.solution.residual_norms.tolist()]
        assert all(residual in text for residual in residuals)
        assert f"#{int(found.helpful.indices[0, 0])}" in text
        # Figures, and on each of ten test images itself and five of either sign.
        shown = browser.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth])")
        assert len(shown) == 3 + 10 * 11
        assert all(complete and natural > 0 for complete, natural in shown)
        # Nothing sticks out, and wide things scroll where they are.
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        dark_sources = browser.evaluate(
            "[...document.querySelectorAll('picture')].filter("
            "p => p.querySelector('img').currentSrc == p.querySelector('source').srcset).length"
        )
        assert dark_sources == (3 if dark else 0)
        page_is_dark = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert page_is_dark == ("rgb(20, 24, 30)" if dark else "rgb(255, 255, 255)")
        assert browser.requests == [path.resolve().as_uri()]
        assert browser.complaints == []


@pytest.mark.browser
def test_a_browser_obeys_the_policy_of_the_page_and_would_tell(
    browser, digits, tmp_path: Path
) -> None:
    path, _ = digits
    worse, wanted = tmp_path / "worse.html", "http://127.0.0.1:9/x.png"
    added = f"<img src='{wanted}'><script>document.title = 'run'</script></main>"
    text = path.read_text("utf-8").replace("</main>", added)
    worse.write_text(text, "utf-8")
    browser.show(worse)
    assert "Content Security Policy" in str(browser.complaints)
    assert wanted in str(browser.complaints)
    assert browser.evaluate("document.title") == "Which training images decide?"
    worse.write_text(text.replace("Content-Security-Policy", "nothing"), "utf-8")
    browser.show(worse)
    assert wanted in browser.requests
    assert browser.complaints
    assert browser.evaluate("document.title") == "run"
