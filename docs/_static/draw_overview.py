"""Draws the picture of the start page, in a wide form and in a tall one for phones.

``python docs/_static/draw_overview.py`` writes ``overview-wide.svg`` and ``overview-tall.svg``
beside this file. The page contains them as they are, so that they take the colours of its theme;
opened by themselves they follow the colour scheme of the reader.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from math import exp, sin
from pathlib import Path

FOLDER = Path(__file__).parent

TITLE = "What hessops does"
DESCRIPTION = (
    "A model, a loss and data make an operator A: the curvature, a P by P matrix that is never "
    "formed. A product of A with a vector is a pass over the data. Operators have an algebra, "
    "inverses and estimates. From these come influences, Laplace samples, pruning scores and "
    "spectra."
)

# Colours of the page where there is one (variables of furo), else of the reader's scheme.
STYLE = """
.hops { --hops-ink: var(--color-foreground-primary, #1c1e21);
  --hops-muted: var(--color-foreground-secondary, #55595f);
  --hops-rule: var(--color-foreground-border, #8a9099);
  --hops-box: var(--color-background-secondary, #f6f8fa); --hops-ground: #ffffff;
  --hops-accent: var(--hops-accent-of-page, #0b5fa5);
  --hops-warm: var(--hops-warm-of-page, #c8500a);
  font-family: system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
@media (prefers-color-scheme: dark) {
  .hops { --hops-ink: var(--color-foreground-primary, #e6e8eb);
    --hops-muted: var(--color-foreground-secondary, #a9b0b8);
    --hops-rule: var(--color-foreground-border, #727982);
    --hops-box: var(--color-background-secondary, #1e2126); --hops-ground: #131416;
    --hops-accent: var(--hops-accent-of-page, #6cb0f0);
    --hops-warm: var(--hops-warm-of-page, #f0935a); } }
.hops text { fill: var(--hops-ink); font-size: 15px; }
.hops text.name { font-weight: 600; font-size: 16px; }
.hops text.head { fill: var(--hops-muted); font-size: 14px; }
.hops text.note { fill: var(--hops-muted); font-size: 14px; }
.hops text.code { font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono",
  monospace; font-size: 14px; }
.hops text.letter { font-size: 40px; font-style: italic;
  font-family: Georgia, "DejaVu Serif", serif; }
.hops .box { fill: var(--hops-box); stroke: var(--hops-rule); stroke-width: 1; }
.hops .cell { fill: var(--hops-accent); }
.hops .unformed { fill: none; stroke: var(--hops-accent); stroke-width: 1.6;
  stroke-dasharray: 6 4; }
.hops .plate { fill: var(--color-background-primary, var(--hops-ground)); opacity: 0.85; }
.hops .arrow { stroke: var(--hops-muted); stroke-width: 2; fill: none; }
.hops .tip { fill: var(--hops-muted); }
.hops .line { stroke: var(--hops-accent); stroke-width: 2; fill: none; }
.hops .thin { stroke: var(--hops-rule); stroke-width: 1; fill: none; }
.hops .plus { fill: var(--hops-accent); } .hops .minus { fill: var(--hops-warm); }
"""


@dataclass
class Drawing:
    """Parts of an SVG of a certain size."""

    name: str
    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def add(self, part: str) -> None:
        """Puts a part on top of the others."""
        self.parts.append(part)

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """Words on a line; the anchor says where x is."""
        style = f' class="{kind}"' if kind else ""
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self.add(f"<text {place}{style}>{escape(words)}</text>")

    def rect(
        self, x: float, y: float, width: float, height: float, kind: str, more: str = ""
    ) -> None:
        """A rectangle."""
        size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.add(f'<rect class="{kind}" {size} {more}/>')

    def box(self, x: float, y: float, width: float, height: float) -> None:
        """A frame with round corners."""
        self.rect(x, y, width, height, "box", 'rx="6"')

    def path(self, points: list[tuple[float, float]], kind: str) -> None:
        """A line through points."""
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add(f'<polyline class="{kind}" points="{line}"/>')

    def arrow(self, x: float, y: float, dx: float, dy: float) -> None:
        """From a point to the right or down."""
        tip = 9
        ex, ey = x + dx, y + dy
        if dx:
            self.path([(x, y), (ex - tip + 1, ey)], "arrow")
            points = f"{ex:g},{ey:g} {ex - tip:g},{ey - 5:g} {ex - tip:g},{ey + 5:g}"
        else:
            self.path([(x, y), (ex, ey - tip + 1)], "arrow")
            points = f"{ex:g},{ey:g} {ex - 5:g},{ey - tip:g} {ex + 5:g},{ey - tip:g}"
        self.add(f'<polygon class="tip" points="{points}"/>')

    def write(self) -> None:
        """The file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="hops {self.name}" role="img" '
            f'viewBox="0 0 {self.width} {self.height}" '
            f'aria-labelledby="{self.name}-title {self.name}-description">'
        )
        names = (
            f'<title id="{self.name}-title">{TITLE}</title>'
            f'<desc id="{self.name}-description">{DESCRIPTION}</desc>'
        )
        text = "\n".join([head, names, f"<style>{STYLE}</style>", *self.parts, "</svg>", ""])
        (FOLDER / f"{self.name}.svg").write_text(text, "utf-8")


def matrix(drawing: Drawing, x: float, y: float, side: float) -> None:
    """A symmetric pattern that fades, dashed since it is not there, with its letter."""
    count = 13
    cell = side / count
    for i in range(count):
        for j in range(count):
            near = exp(-abs(i - j) / 2.2) + 0.35 * (sin(1.3 * i * j + i + j) > 0.55)
            opacity = 0.04 + 0.5 * min(near, 1.0)
            drawing.rect(
                x + j * cell + 0.7,
                y + i * cell + 0.7,
                cell - 1.4,
                cell - 1.4,
                "cell",
                f'opacity="{opacity:.2f}"',
            )
    drawing.rect(x - 3, y - 3, side + 6, side + 6, "unformed", 'rx="4"')
    middle = x + side / 2
    drawing.rect(middle - 38, y + side / 2 - 36, 76, 72, "plate", 'rx="6"')
    drawing.text(middle, y + side / 2 + 6, "A", "letter", "middle")
    drawing.text(middle, y + side / 2 + 28, "P × P", "name", "middle")


def influences(drawing: Drawing, x: float, y: float) -> None:
    """Bars to both sides of a line."""
    drawing.path([(x + 18, y), (x + 18, y + 40)], "thin")
    for row, length in enumerate((17, 10, 4, -6, -14)):
        left = x + 18 + min(length, 0)
        kind = "plus" if length > 0 else "minus"
        drawing.rect(left, y + 1 + 8 * row, abs(length), 5.5, kind)


def samples(drawing: Drawing, x: float, y: float) -> None:
    """Points in an ellipse."""
    turned = f'transform="rotate(-30 {x + 20:g} {y + 20:g})"'
    drawing.add(f'<ellipse class="line" cx="{x + 20:g}" cy="{y + 20:g}" rx="20" ry="11" {turned}/>')
    for dx, dy in ((-9, 4), (-3, -3), (2, 5), (7, -6), (11, -2), (-12, 9), (0, 0), (6, 2)):
        drawing.add(f'<circle class="plus" cx="{x + 20 + dx:g}" cy="{y + 20 + dy:g}" r="2"/>')


def pruned(drawing: Drawing, x: float, y: float) -> None:
    """Weights, of which some are left."""
    kept = "1010010010111000110100101"
    for place, bit in enumerate(kept):
        i, j = divmod(place, 5)
        more = "" if bit == "1" else 'opacity="0.16"'
        drawing.rect(x + 8 * j, y + 8 * i, 6.4, 6.4, "plus", more)


def spectrum(drawing: Drawing, x: float, y: float) -> None:
    """A bulk of eigenvalues, and some outside."""
    heights = [
        34 * exp(-(((t - 9) / 4.5) ** 2)) + 9 * exp(-(((t - 26) / 2) ** 2))
        + 7 * exp(-(((t - 35) / 1.8) ** 2)) for t in range(42)
    ]  # fmt: skip
    drawing.path([(x, y + 39), (x + 41, y + 39)], "thin")
    drawing.path([(x + t, y + 38 - height) for t, height in enumerate(heights)], "line")


GIVEN = (("model", "nn.Module"), ("loss", "any, checked"), ("data", "DataLoader"))
ACTIONS = (
    ("algebra", ("A + B,  A @ B,  c * A", "A.shift(λ)")),
    ("inverse", ("(A + λI)⁻¹ b", "with true residuals")),
    ("estimate", ("trace, eigenvalues, …", "with their errors")),
)
RESULTS = (
    ("influences", "of data points", influences),
    ("Laplace", "posteriors", samples),
    ("pruning", "scores", pruned),
    ("spectra", "and sharpness", spectrum),
)


def wide() -> Drawing:
    """From left to right."""
    drawing = Drawing("overview-wide", 740, 312)
    for x, head in ((0, "you have"), (162, "operator"), (350, "you compute"), (566, "you get")):
        drawing.text(x, 18, head, "head")

    for row, (name, note) in enumerate(GIVEN):
        y = 36 + 92 * row
        drawing.box(0.5, y, 122, 76)
        drawing.text(14, y + 32, name, "name")
        drawing.text(14, y + 56, note, "note")
    drawing.arrow(127, 166, 30, 0)

    matrix(drawing, 165, 39, 148)
    drawing.text(239, 219, "never formed", "name", "middle")
    drawing.text(239, 245, "Hessian, Gauss-Newton:", "note", "middle")
    drawing.text(239, 264, "passes over the data", "note", "middle")
    drawing.text(239, 289, "KFAC, EKFAC:", "note", "middle")
    drawing.text(239, 308, "closed forms", "note", "middle")
    drawing.arrow(320, 166, 26, 0)

    for row, (name, lines) in enumerate(ACTIONS):
        y = 36 + 92 * row
        drawing.box(350, y, 184, 76)
        drawing.text(361, y + 23, name, "name")
        drawing.text(361, y + 45, lines[0], "code" if row < 2 else "note")
        drawing.text(361, y + 65, lines[1], "code" if row == 0 else "note")
    drawing.arrow(538, 166, 24, 0)

    for row, (name, note, draw) in enumerate(RESULTS):
        y = 42 + 69 * row
        draw(drawing, 567, y)
        drawing.text(617, y + 17, name, "name")
        drawing.text(617, y + 37, note, "note")
    return drawing


def tall() -> Drawing:
    """From top to bottom."""
    drawing = Drawing("overview-tall", 350, 764)
    drawing.text(0, 16, "you have", "head")
    for column, (name, note) in enumerate(GIVEN):
        x, width = (0.5, 119.5, 238.5)[column], 111
        drawing.box(x, 28, width, 60)
        drawing.text(x + 10, 53, name, "name")
        drawing.text(x + 10, 75, note, "note")
    drawing.arrow(75, 94, 0, 34)

    matrix(drawing, 4, 138, 142)
    drawing.text(166, 150, "operator", "head")
    drawing.text(166, 178, "never formed", "name")
    drawing.text(166, 205, "Hessian, Gauss-Newton:", "note")
    drawing.text(166, 225, "passes over the data", "note")
    drawing.text(166, 253, "KFAC, EKFAC:", "note")
    drawing.text(166, 273, "closed forms", "note")
    drawing.arrow(75, 290, 0, 34)

    drawing.text(92, 313, "you compute", "head")
    for row, (name, lines) in enumerate(ACTIONS):
        y = 332 + 74 * row
        drawing.box(0.5, y, 349, 64)
        drawing.text(12, y + 27, name, "name")
        drawing.text(112, y + 27, lines[0], "code" if row < 2 else "note")
        drawing.text(112, y + 50, lines[1], "code" if row == 0 else "note")
    drawing.arrow(75, 550, 0, 34)

    drawing.text(92, 573, "you get", "head")
    for place, (name, note, draw) in enumerate(RESULTS):
        x, y = 2 + 178 * (place % 2), 608 + 84 * (place // 2)
        draw(drawing, x, y)
        drawing.text(x + 47, y + 17, name, "name")
        drawing.text(x + 47, y + 37, note, "note")
    return drawing


if __name__ == "__main__":
    wide().write()
    tall().write()
