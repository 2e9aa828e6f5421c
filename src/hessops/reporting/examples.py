"""The training points behind each test point, as images, rows of a table or texts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hessops.reporting.images import Bytes, Floats, has_many_pixels, image_element
from hessops.reporting.markup import Html, count, cut, element, foreign, joined, number, table
from hessops.reporting.points import Reader, Shown
from hessops.reporting.summary import Extremes, ScoreSummary

# Columns of a table of features.
MOST_FEATURES = 40
GROUPS = {"helpful": "Most helpful", "harmful": "Most harmful"}
NONE_OF_SIGN = {"helpful": "positive", "harmful": "negative"}


@dataclass(frozen=True)
class Scored:
    """A training point and its influence."""

    point: Shown
    score: float


@dataclass(frozen=True)
class Case:
    """A test point and the training points of extreme influence on it.

    Attributes:
        test: The test point.
        groups: ``"helpful"`` and ``"harmful"`` -> training points, the most extreme first.
        badges: What is wrong with its scores.
    """

    test: Shown
    groups: Mapping[str, Sequence[Scored]]
    badges: Sequence[str]

    def points(self) -> Iterable[Shown]:
        """All of them."""
        yield self.test
        for scored in (one for group in self.groups.values() for one in group):
            yield scored.point


def cases_of(
    summary: ScoreSummary, train: Reader, test: Reader, failed: Mapping[int, Collection[str]]
) -> list[Case]:
    """The test points that are shown, with what is behind them.

    Args:
        summary: The scores.
        train: Reads training points.
        test: Reads test points.
        failed: Test point -> what became of its solves, where they did not converge.
    """
    known: dict[int, Shown] = {}

    def scored(extremes: Extremes) -> list[Scored]:
        for index in extremes.indices.tolist():
            if index not in known:
                known[index] = train.shown(index)
        pairs = zip(extremes.indices.tolist(), extremes.values.tolist(), strict=True)
        return [Scored(known[index], value) for index, value in pairs]

    cases = []
    for point in summary.helpful:
        badges = [f"solve: {status}" for status in failed.get(point, ())]
        if summary.non_finite[point]:
            badges.append(f"{count(int(summary.non_finite[point]), 'score')} not finite")
        groups = {
            "helpful": scored(summary.helpful[point]),
            "harmful": scored(summary.harmful[point]),
        }
        cases.append(Case(test.shown(point), groups, badges))
    return cases


def examples(
    cases: Sequence[Case], feature_names: Sequence[str] | None, num_training: int | None
) -> list[Html]:
    """An article for each test point.

    Args:
        cases: The test points.
        feature_names: Names of the numbers of an input.
        num_training: N, for the estimated changes of the losses.
    """
    images = [p.image for case in cases for p in case.points() if p.image is not None]
    texts = any(p.text is not None for case in cases for p in case.points())
    if images:
        low, high = _range_of(images)
        note = ""
        if any(image.dtype != np.uint8 for image in images) and (low, high) != (0.0, 1.0):
            note = f"Pixels from {number(low)} to {number(high)} are shown from black to white."
        articles = [_article(case, _pictured(case, low, high)) for case in cases]
        return [element("p", note, class_="note"), *articles] if note else articles
    if texts:
        return [_article(case, _written(case)) for case in cases]
    return [_article(case, _tabular(case, feature_names, num_training)) for case in cases]


def _article(case: Case, content: Html) -> Html:
    badges = [element("span", badge, class_="badge") for badge in case.badges]
    heading = [f"Test point {case.test.index}"]
    if case.test.label:
        heading.append(joined([": ", foreign(case.test.label)]))
    title = element("h3", *heading, *(joined([" ", badge]) for badge in badges))
    empty = [
        element("p", f"No training point has a {NONE_OF_SIGN[group]} influence.", class_="note")
        for group, points in case.groups.items()
        if not points
    ]
    return element("article", title, content, *empty, id=f"test-{case.test.index}")


def _score(scored: Scored, group: str) -> Html:
    return element("strong", number(scored.score, sign=True), class_=group)


# --- images ---------------------------------------------------------------------------------


def _range_of(images: Iterable[Floats | Bytes]) -> tuple[float, float]:
    """What is black and what is white, for all images of the page."""
    numbers = [image for image in images if image.dtype != np.uint8]
    if not numbers:
        return 0.0, 1.0
    low = min(float(image.min()) for image in numbers)
    high = max(float(image.max()) for image in numbers)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def _pictured(case: Case, low: float, high: float) -> Html:
    images = [point.image for point in case.points() if point.image is not None]
    is_large = any(has_many_pixels(image) for image in images)
    kind = "examples large" if is_large else "examples"

    def item(point: Shown, name: str, *caption: object) -> Html:
        words = f"{name} {point.index}" + (f": {cut(point.label)}" if point.label else "")
        shown: object = ""
        if point.image is not None:
            shown = image_element(point.image, low, high, words)
        label = joined([foreign(point.label, 80), " "]) if point.label else ""
        below = element("figcaption", *caption[:1], label, *caption[1:])
        return element("li", element("figure", shown, below))

    parts = [_group("The point", element("ul", item(case.test, "test point"), class_=kind))]
    for group, points in case.groups.items():
        if points:
            items = (
                item(one.point, "training point", _score(one, group), f"#{one.point.index}")
                for one in points
            )
            parts.append(_group(GROUPS[group], element("ol", *items, class_=kind)))
    return element("div", *parts, class_="groups pictured")


def _group(heading: str, content: Html) -> Html:
    return element("section", element("h4", heading), content)


# --- texts ----------------------------------------------------------------------------------


def _written(case: Case) -> Html:
    def text(point: Shown) -> Html:
        words = point.text if point.text is not None else _features_in_words(point)
        return element("p", cut(words), dir="auto")

    parts = []
    for group, points in case.groups.items():
        items = [
            element(
                "li",
                _score(one, group),
                f" #{one.point.index} ",
                foreign(one.point.label) if one.point.label else "",
                text(one.point) if _has_input(one.point) else "",
            )
            for one in points
        ]
        if items:
            parts.append(_group(GROUPS[group], element("ol", *items, class_="texts")))
    groups = element("div", *parts, class_="groups written")
    return joined([text(case.test) if _has_input(case.test) else "", groups])


def _has_input(point: Shown) -> bool:
    return point.text is not None or point.features is not None


def _features_in_words(point: Shown) -> str:
    return ", ".join(number(value) for value in point.features or ())


# --- rows of a table ------------------------------------------------------------------------


def _tabular(case: Case, names: Sequence[str] | None, num_training: int | None) -> Html:
    width = max(len(point.features or ()) for point in case.points())
    shown = min(width, MOST_FEATURES)
    head: list[object] = ["Point", "Description", "Influence"]
    if num_training is not None:
        head.append("Loss change")
    features = [names[i] if names is not None else f"feature {i}" for i in range(shown)]
    head += [foreign(name, 60) for name in features]

    def cells(point: Shown, *scores: object) -> list[object]:
        values = [number(value) for value in (point.features or ())[:shown]]
        label = foreign(point.label) if point.label else ""
        return [label, *scores, *values, *[""] * (shown - len(values))]

    blanks = [""] * (1 if num_training is None else 2)
    rows, kinds = [[f"test {case.test.index}", *cells(case.test, *blanks)]], ["test"]
    for group, points in case.groups.items():
        for one in points:
            scores: list[object] = [_score(one, group)]
            if num_training is not None:
                scores.append(number(one.score / num_training, sign=True))
            rows.append([f"{group} #{one.point.index}", *cells(one.point, *scores)])
            kinds.append(group)
    caption = f"Training points of extreme influence on test point {case.test.index}"
    if num_training is not None:
        caption += f"; loss change: the estimate for it left out, influence ÷ {num_training:,}"
    if shown < width:
        caption += f"; the first {shown} of {width} features"
    return table(caption, head, rows, row_classes=["test" if k == "test" else None for k in kinds])
