"""report: an influence run as one page of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hessops.files import write_whole
from hessops.influence.lazy import LazyInfluences
from hessops.influence.model import InfluenceFunctionModel
from hessops.operators.solution import Solution
from hessops.reporting import checks
from hessops.reporting.chunks import SlicedArray, checked_shape
from hessops.reporting.examples import cases_of, examples
from hessops.reporting.figures import require_matplotlib
from hessops.reporting.markup import count
from hessops.reporting.outcomes import failed_rows, status_of
from hessops.reporting.page import (
    Section,
    page,
    selection,
    solves,
    verdict,
)
from hessops.reporting.page import (
    scores as section_of_scores,
)
from hessops.reporting.points import Describe, Picture, Points, Reader
from hessops.reporting.settings import settings_of
from hessops.reporting.summary import summarised
from hessops.validation import checked_count


def report(
    path: str | Path,
    scores: SlicedArray | LazyInfluences,
    *,
    model: InfluenceFunctionModel | None = None,
    solutions: Solution | Mapping[str, Solution] | None = None,
    train: object = None,
    test: object = None,
    describe: Describe | None = None,
    images: bool | Picture = False,
    feature_names: Sequence[str] | None = None,
    settings: Mapping[str, object] | None = None,
    title: str = "Influence report",
    top: int = 5,
    test_points: int | Sequence[int] = 20,
) -> Path:
    r"""Writes an influence run as one HTML page: settings, solves, scores and examples.

    The page is a single file without scripts that loads nothing from anywhere, for wide and narrow
    screens, light and dark, and for paper. What a reader must know before believing it is at its
    top: right-hand sides that did not meet their tolerance, and scores that are not finite. The
    sign is that of `hessops.influence.InfluenceFunctionModel`: a positive influence
    :math:`\mathcal I` is one of a helpful training point, without which the loss on the test point
    would be larger by about :math:`\mathcal I / N`.

    The scores are read once, in pieces of about a million, and only a summary is kept: a zarr array
    or a memory-mapped one may be larger than memory. Of `train` and `test` only those points are
    read that are shown. All text is escaped. The file is written whole or not at all.

    Args:
        path: Where to write; its directory must exist.
        scores: ``(m, n)`` real numbers, m test points by n training points, in mode UP: anything
            that has a shape and is read by slices (torch, numpy, zarr, h5py, dask), or what a
            `hessops.influence.SequentialInfluenceCalculator` gives, which is then computed.
        model: The fitted influence model, for the settings and for N.
        solutions: What ``model.inverses[...].solve`` returned for the gradients of the m test
            points, one right-hand side each; several blocks as block name -> solution. With
            ``history=True`` there is a picture of the convergence.
        train: The n training points: a pair ``(x, y)`` of arrays or sequences, y may be ``None``;
            or a map-style dataset with such items. ``None`` shows positions alone.
        test: The m test points, likewise.
        describe: Function of ``(x, y)`` to what is said of a point; ``None`` shows y.
        images: ``True`` where inputs are images, or a function from an input to an image:
            ``(height, width)`` or with 1, 3 or 4 channels first or last (first where both fit), as
            bytes or as any numbers. Otherwise numbers in a row are shown as a row of a table, and
            text as text.
        feature_names: Names of the numbers of an input that is a row of a table.
        settings: Further lines for the settings, such as the data set and the seed of the training.
        title: The title of the page.
        top: The most training points of each sign shown for a test point.
        test_points: How many test points have examples, the first ones; or which.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed (extra ``plot``).
        ArgumentTypeError, ArgumentError: An argument is something else than said above.
        ShapeError: `scores` are empty or not ``(m, n)``; `solutions`, `train`, `test` or
            `feature_names` are of other numbers of points, parameters or features.
        DtypeError: `scores` are no real numbers.
        NonFiniteError: An image holds NaN or infinity. (Scores that do are told on the page.)
        ParameterNameError: `solutions` has other blocks than the model.
        NotFittedError: `model` is not fitted.
        FileNotFoundError, IsADirectoryError, OSError: Of the file system; an earlier file stays as
            it was.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from hessops.influence import CgInfluence
        >>> from hessops.reporting import report
        >>> net = torch.nn.Linear(2, 1)
        >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
        >>> model = CgInfluence(net, torch.nn.MSELoss(), 0.1).fit([(x, y)])
        >>> gradients = model.gradient_provider.flat_grads(x[:3], y[:3])
        >>> solution = model.inverses["full"].solve(gradients, history=True)
        >>> scores = model.influences_from_factors(solution.value, x, y)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = report(
        ...         Path(folder) / "influence.html",
        ...         scores,
        ...         model=model,
        ...         solutions=solution,
        ...         train=(x, y),
        ...         test=(x[:3], y[:3]),
        ...     )
        ...     "3 of 3 right-hand sides met the tolerance" in page.read_text()
        True
    """
    require_matplotlib()
    path, (m, n) = checks.checked_path(path), checked_shape(scores)
    if model is not None:
        checks.require_model(model)
    solved = checks.checked_solutions(solutions, model, m)
    picture, chosen = checks.checked_picture(images), checks.checked_points(test_points, m)
    checked_count(top, "top")
    of_train = Reader(_points(train, n, "train"), "training point", describe, picture)
    of_test = Reader(_points(test, m, "test"), "test point", describe, picture)

    summary = summarised(scores, chosen, top)
    cases = cases_of(summary, of_train, of_test, _failed(solved))
    checks.require_names(feature_names, (p.features for case in cases for p in case.points()))
    num_training = None if model is None else model.fitted.data.num_points
    articles = examples(cases, feature_names, num_training)
    sections = [
        Section("solves", "Solves", solves(solved, model)),
        Section("scores", "Scores", section_of_scores(summary, num_training)),
        Section("examples", "Examples", [selection(chosen, m, top), *articles]),
        Section("settings", "Settings", settings_of(model, settings or {}, (m, n))),
    ]
    by = "Influences" if model is None else type(model).__name__
    about = f"{by}: {count(n, 'training point')} on {count(m, 'test point')}"
    content = page(title, about, verdict(solved, model, summary), sections).encode()
    write_whole(path, lambda file: file.write(content))
    return path


def _points(given: object, size: int, name: str) -> Points | None:
    return None if given is None else Points(given, size, name)


def _failed(solutions: Mapping[str, Solution]) -> dict[int, set[str]]:
    """Test point -> what became of its solves that did not meet their tolerance."""
    found: dict[int, set[str]] = {}
    for solution in solutions.values():
        for row in failed_rows(solution):
            found.setdefault(row, set()).add(status_of(solution, row))
    return found
