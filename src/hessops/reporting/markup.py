"""Markup: HTML in which text is escaped because it is text."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

VOID = frozenset({"br", "img", "link", "meta", "source"})
# What no HTML may contain, and surrogates, which no encoding has.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# Texts of others are cut here, so that one of them does not make the page.
MOST_CHARACTERS = 400
# Texts of more than this are not squeezed to the width of a word in a table.
LONG = 30


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def escaped(value: object) -> Html:
    """Any value as text of a page; markup stays as it is.

    Example:
        >>> from hessops.reporting.markup import escaped
        >>> escaped("<b> & co")
        '&lt;b&gt; &amp; co'
    """
    if isinstance(value, Html):
        return value
    return Html(html.escape(_FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value))))


def element(tag: str, /, *children: object, **attributes: object) -> Html:
    """An element; values of attributes are escaped, and children that are not `Html`.

    Args:
        tag: Its name.
        children: What is inside.
        attributes: By name, with ``class_`` for class and ``_`` for a hyphen; those that are
            ``None`` or ``False`` are left out, and ``True`` has no value.

    Example:
        >>> from hessops.reporting.markup import element
        >>> element("p", "1 < 2", class_="note", hidden=True)
        '<p class="note" hidden>1 &lt; 2</p>'
    """
    words = [tag]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        written = key.rstrip("_").replace("_", "-")
        words.append(written if value is True else f'{written}="{escaped(str(value))}"')
    opening = f"<{' '.join(words)}>"
    if tag in VOID:
        return Html(opening)
    return Html(f"{opening}{joined(children)}</{tag}>")


def joined(parts: Iterable[object], separator: str = "") -> Html:
    """Parts one after the other, escaped unless they are markup."""
    return Html(separator.join(escaped(part) for part in parts))


def foreign(value: object, most: int = MOST_CHARACTERS) -> Html:
    """A text of somebody else, cut where it is long; its direction of writing stays inside."""
    text = cut(str(value), most)
    return element("bdi", text, class_="long" if len(text) > LONG else None)


def cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text, or its beginning and how much is missing."""
    if len(text) <= most:
        return text
    return f"{text[:most]} … ({len(text) - most} more characters)"


def number(value: float, digits: int = 3, *, sign: bool = False) -> str:
    """A number to read, with so many significant digits.

    Example:
        >>> from hessops.reporting.markup import number
        >>> number(0.000123456), number(2.5, sign=True), number(float("nan"))
        ('1.23e−04', '+2.50', 'NaN')
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        text = "inf"
    elif value == 0:
        text = "0"
    elif 1e-3 <= abs(value) < 1e6:
        text = f"{abs(value):#.{digits}g}" if abs(value) < 10**digits else f"{abs(value):.0f}"
        text = text.removesuffix(".")
    else:
        text = f"{abs(value):.{digits - 1}e}"
    lead = "-" if value < 0 else "+" if sign and value > 0 else ""
    return f"{lead}{text}".replace("-", "\N{MINUS SIGN}")


def measured(value: float) -> str:
    """A norm or a tolerance, in the same form whatever its size, so that columns are compared.

    Example:
        >>> from hessops.reporting.markup import measured
        >>> measured(0.00116), measured(16.2)
        ('1.16e−03', '1.62e+01')
    """
    if not math.isfinite(value):
        return number(value)
    return f"{value:.2e}".replace("-", "\N{MINUS SIGN}")


def count(value: int, noun: str = "") -> str:
    """A count with its thousands apart, and a noun in its number.

    Example:
        >>> from hessops.reporting.markup import count
        >>> count(1, "score"), count(12000, "score")
        ('1 score', '12,000 scores')
    """
    return f"{value:,} {noun}{'' if value == 1 else 's'}" if noun else f"{value:,}"


def listed(values: Sequence[int], most: int = 20) -> str:
    """Some numbers in words, with how many there are beyond the first ones."""
    shown = ", ".join(str(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most:,} more"


def table(
    caption: str,
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    row_classes: Sequence[str | None] = (),
    numeric: bool = True,
) -> Html:
    """A table that scrolls in its own container; the first cell of a row is its heading.

    Args:
        caption: What it shows.
        head: The headings of the columns.
        rows: The cells.
        row_classes: A class for each row, where there are any.
        numeric: Aligns all cells but the first two to the right.
    """
    written = list(rows)
    classes = list(row_classes) or [None] * len(written)
    heading = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [
        element(
            "tr",
            element("th", first, scope="row"),
            *(element("td", cell) for cell in others),
            class_=kind,
        )
        for (first, *others), kind in zip(written, classes, strict=True)
    ]
    inside = element(
        "table",
        element("thead", heading),
        element("tbody", *body),
        class_="numbers" if numeric else None,
        aria_label=caption,
    )
    # The caption is outside of what scrolls, so that it wraps at the width of the screen.
    scrolling = element("div", inside, class_="scroll", role="group", tabindex="0")
    return element("figure", element("figcaption", caption), scrolling)


def terms(pairs: Iterable[tuple[object, object]], kind: str | None = None) -> Html:
    """A list of terms and what they are, of a class."""
    entries = (element("div", element("dt", term), element("dd", value)) for term, value in pairs)
    return element("dl", *entries, class_=kind)
