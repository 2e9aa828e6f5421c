"""The training points of most extreme score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hessops.plotting.arguments import Floats, Ints
from hessops.plotting.style import NEGATIVE, POSITIVE


@dataclass(frozen=True)
class Kind:
    """One of the two kinds of training points.

    Attributes:
        heading: What it is called.
        none: What is said where there is no such point.
        color: Of what is written about it.
        points: Their positions, the most extreme first.
    """

    heading: str
    none: str
    color: str
    points: Ints


def ranked(scores: Floats, k: int) -> tuple[Kind, Kind]:
    """The helpful and the harmful points, at most k of each.

    A point whose score is zero, or of the other sign, is in neither, however few there are. Of
    equal scores the earlier point comes first.
    """
    descending = np.argsort(-scores, kind="stable")[:k]
    ascending = np.argsort(scores, kind="stable")[:k]
    return (
        Kind(
            "most helpful",
            "none: no score is positive",
            POSITIVE,
            descending[scores[descending] > 0],
        ),
        Kind(
            "most harmful", "none: no score is negative", NEGATIVE, ascending[scores[ascending] < 0]
        ),
    )
