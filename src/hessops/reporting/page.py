"""The page: what stands at its top, the section of the scores, and the frame around all."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from hessops.influence.model import InfluenceFunctionModel
from hessops.operators.solution import Solution
from hessops.reporting.figures import convergence_figure, heat_map_figure, histogram_figure
from hessops.reporting.markup import (
    Html,
    count,
    cut,
    element,
    escaped,
    joined,
    listed,
    number,
    terms,
)
from hessops.reporting.outcomes import complaints, of_block, outcomes_of
from hessops.reporting.settings import how_it_inverts
from hessops.reporting.style import STYLE
from hessops.reporting.summary import ScoreSummary


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its heading, and what is in it."""

    anchor: str
    heading: str
    content: Sequence[Html]


def verdict(
    solutions: Mapping[str, Solution], model: InfluenceFunctionModel | None, summary: ScoreSummary
) -> Html:
    """What a reader must know before believing the rest."""
    found = complaints(solutions)
    if not solutions:
        is_missed, sentence = how_it_inverts(model)
        found += [escaped(sentence)] if is_missed else []
    if summary.num_non_finite:
        found.append(_of_non_finite(summary))
    if found:
        items = (element("li", item) for item in found)
        heading = element("h2", "\N{WARNING SIGN} Read this first")
        return element("section", heading, element("ul", *items), class_="verdict bad")
    finite = f"All {summary.num_finite:,} scores are finite."
    if not solutions:  # nothing is known to be wrong, which is not the same as right
        heading = element("h2", "No outcomes of solves")
        text = element("p", f"{how_it_inverts(model)[1]} {finite}")
        return element("section", heading, text, class_="verdict unknown")
    right_hand_sides = sum(len(solution.status) for solution in solutions.values())
    heading = element("h2", "\N{CHECK MARK} Nothing failed")
    text = element("p", f"All {right_hand_sides:,} right-hand sides met their tolerance. {finite}")
    return element("section", heading, text, class_="verdict good")


def _of_non_finite(summary: ScoreSummary) -> Html:
    points = [i for i, found in enumerate(summary.non_finite.tolist()) if found]
    total = summary.num_finite + summary.num_non_finite
    head = f"{summary.num_non_finite:,} of {total:,} scores are NaN or infinite."
    text = (
        f" Test points {listed(points)}. They are left out of every number below. Chunks of a "
        "store that were not written yet read as NaN: complete the run."
    )
    return joined([element("strong", head), text])


def solves(solutions: Mapping[str, Solution], model: InfluenceFunctionModel | None) -> list[Html]:
    """The outcome of every right-hand side, with pictures where there are histories."""
    if not solutions:
        return [element("p", how_it_inverts(model)[1])]
    parts = [
        element(
            "p",
            "One linear system (A + λI) x = b for each test point, with b the gradient of its "
            "loss. The residual ‖b − Ax‖ (with λ) is measured on what was returned, not taken "
            "from the recurrence of the method.",
        )
    ]
    for name, solution in solutions.items():
        if name:
            parts.append(element("h3", f"Block {name}"))
        if any(len(history) > 1 for history in solution.residual_history or ()):
            drawn = convergence_figure(solution, f"the right-hand sides{of_block(name)}")
            parts.append(element("div", drawn, class_="pictures"))
        parts += outcomes_of(name, solution)
    return parts


def scores(summary: ScoreSummary, num_training: int | None) -> list[Html]:
    """The sign convention, summary numbers and pictures."""
    beside = [_numbers(summary)]
    if summary.num_positive + summary.num_negative:
        beside.append(histogram_figure(summary))
    return [
        element("p", _convention(num_training)),
        element("div", *beside, class_="pictures"),
        heat_map_figure(summary),
    ]


def _convention(num_training: int | None) -> Html:
    of_points = "N training points"
    if num_training is not None:
        of_points = f"N = {num_training:,} training points"
    return joined(
        [
            "A score is the influence of a training point on the loss on a test point. ",
            element("strong", "Positive is helpful, negative is harmful"),
            f": leaving the training point out changes the loss on the test point by about score ÷ "
            f"N, with {of_points}. It is a first-order estimate: read large scores as a ranking.",
        ]
    )


def _numbers(summary: ScoreSummary) -> Html:
    total = summary.shape[0] * summary.shape[1]
    zero = summary.num_finite - summary.num_positive - summary.num_negative
    pairs: list[tuple[object, object]] = [
        ("Scores", f"{total:,}"),
        ("Helpful (above 0)", _part(summary.num_positive, total)),
        ("Harmful (below 0)", _part(summary.num_negative, total)),
        ("Zero", _part(zero, total)),
        ("NaN or infinite", _part(summary.num_non_finite, total)),
    ]
    if summary.num_finite:
        pairs += [
            ("Largest", number(summary.largest, 4, sign=True)),
            ("Smallest", number(summary.smallest, 4, sign=True)),
            ("Mean", number(summary.mean, 4, sign=True)),
            ("Standard deviation", number(summary.deviation, 4)),
        ]
    return terms(pairs, "short")


def _part(some: int, total: int) -> str:
    return f"{some:,} ({some / total:.1%})" if some else "0"


def selection(chosen: Sequence[int], m: int, top: int) -> Html:
    """Which test points have examples, and which of their training points are shown."""
    of_all = f"All {count(m, 'test point')}"
    if len(chosen) < m:
        is_first = list(chosen) == list(range(len(chosen)))
        of_all = f"{len(chosen)} of {m:,} test points{', the first ones' if is_first else ''}"
    text = (
        f"{of_all}, each with up to {top} training points of most positive and up to {top} of most "
        "negative influence. Beside a training point stand its influence and its position (#)."
    )
    return element("p", text)


def page(title: str, about: str, top: Html, sections: Sequence[Section]) -> Html:
    """The whole document.

    Args:
        title: Its heading.
        about: A line below that.
        top: What stands before all sections.
        sections: The parts.
    """
    links = (element("li", element("a", s.heading, href=f"#{s.anchor}")) for s in sections)
    body = element(
        "body",
        element(
            "header",
            element("h1", cut(title)),
            element("p", about, class_="note"),
            element("nav", element("ul", *links)),
        ),
        element(
            "main",
            top,
            *(
                element("section", element("h2", s.heading), *s.content, id=s.anchor)
                for s in sections
            ),
        ),
        element("footer", _signature()),
    )
    return joined([Html("<!DOCTYPE html>\n"), _document(title, body), "\n"])


def _document(title: str, body: Html) -> Html:
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy()),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("link", rel="icon", href="data:,"),  # else a server is asked for one
        element("title", cut(title)),
        element("style", Html(STYLE)),
    )
    return element("html", head, body, lang="en")


def _policy() -> str:
    """Nothing may be loaded or run but images within the page and its one style sheet."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )


def _signature() -> Html:
    import hessops

    now = datetime.now(UTC).replace(microsecond=0)
    written = element("time", now.strftime("%Y-%m-%d %H:%M UTC"), datetime=now.isoformat())
    return joined([f"Written by hessops {hessops.__version__} on ", written, "."])
