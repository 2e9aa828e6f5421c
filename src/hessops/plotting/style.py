"""The colours, dashes and forms of numbers that all pictures share."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log10

from matplotlib.colors import Colormap, LinearSegmentedColormap

INK = "#222222"
MUTED = "#6b6b6b"
RULE = "#b8b8b8"

# What a sign looks like everywhere: of different hue and of different lightness, and each dark
# enough for text on white.
POSITIVE = "#0b4f8a"
NEGATIVE = "#c8500a"

# Neighbours differ in hue and in lightness; dashes go with them, for prints without colours.
PALETTE = ("#0b4f8a", "#c97f00", "#8c3f8c", "#009e73", "#c8500a", "#222222", "#3b94d1")
Dashes = str | tuple[float, tuple[float, ...]]
DASHES: tuple[Dashes, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (1.2, 1.2)),
    (0, (5, 1.6, 1.2, 1.6)),
    (0, (8, 2)),
    (0, (3, 1.2, 1.2, 1.2, 1.2, 1.2)),
)

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Pen:
    """How one of several things is drawn."""

    color: str
    dashes: Dashes


def pen(position: int) -> Pen:
    """The pen of the thing at some position; they repeat after 42."""
    return Pen(PALETTE[position % len(PALETTE)], DASHES[position % len(DASHES)])


def diverging() -> Colormap:
    """From negative by white to positive; the positive end is the darker one."""
    stops = [
        (0.0, "#a83e00"),
        (0.13, NEGATIVE),
        (0.3, "#eda36b"),
        (0.5, "#ffffff"),
        (0.7, "#86aed2"),
        (0.87, POSITIVE),
        (1.0, "#05264a"),
    ]
    return LinearSegmentedColormap.from_list("hessops_diverging", stops)


def signed(values: list[float]) -> list[str]:
    """Numbers with their signs, and as many decimals as give the largest three digits.

    Example:
        >>> from hessops.plotting.style import signed
        >>> signed([0.0123, -0.5, 0.0])
        ['+0.012', '−0.500', '0']
    """
    form = "+" + _form(values, 3)
    return [format(value, form).replace("-", MINUS) if value else "0" for value in values]


def aligned(values: list[float]) -> list[str]:
    """Numbers with as many decimals as give the largest four digits, or fewer where all end in 0.

    Example:
        >>> from hessops.plotting.style import aligned
        >>> aligned([12.3456, -0.5]), aligned([1.5, 0.25]), aligned([1.0, 20.0])
        (['12.35', '−0.50'], ['1.50', '0.25'], ['1', '20'])
    """
    form = _form(values, 4)
    texts = [format(value, form).replace("-", MINUS) for value in values]
    if "e" in form:
        return texts
    while texts and "." in texts[0] and all(text[-1] in "0." for text in texts):
        texts = [text[:-1] for text in texts]
    return texts


def _form(values: list[float], digits: int) -> str:
    largest = max((abs(value) for value in values), default=0.0)
    exponent = floor(log10(largest)) if largest > 0 else 0
    in_range = -4 <= exponent < 5
    return f".{max(0, digits - 1 - exponent)}f" if in_range else f".{digits - 2}e"


def shortened(text: str, most: int) -> str:
    """At most so many letters, the last one an ellipsis where some are left out."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
