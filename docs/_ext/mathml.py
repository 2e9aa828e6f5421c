"""Formulas as MathML, which browsers draw by themselves: pages need no script from elsewhere."""

from __future__ import annotations

import re
import unicodedata
from html import escape

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)

# Browsers know these letters by their own characters, and not as a variant of a plain one.
VARIANTS = {"double-struck": "DOUBLE-STRUCK", "script": "SCRIPT"}
VARIANT = re.compile(rf'<mi mathvariant="({"|".join(VARIANTS)})">([A-Z])</mi>')
# Alignment is a style; the attribute is not in MathML Core.
ALIGNMENT = re.compile(r'columnalign="(\w+)"')
# What the converter does not know comes out as it went in.
LEFT_OVER = re.compile(r"<m\w+[^>]*>\s*(\\\w+|&)\s*</m|<mo />")


def _letter(match: re.Match[str]) -> str:
    variant, letter = VARIANTS[match[1]], match[2]
    for prefix in ("MATHEMATICAL ", ""):
        try:
            return f"<mi>{unicodedata.lookup(f'{prefix}{variant} CAPITAL {letter}')}</mi>"
        except KeyError:  # the other block has it
            continue
    raise KeyError(f"no {variant} {letter}")


def _converted(latex: str, node: nodes.Node, display: str = "inline") -> str:
    # The converter has rows and columns in `split`, and neither in `aligned`.
    mathml = convert(re.sub(r"(begin|end){aligned}", r"\1{split}", latex), display=display)
    if LEFT_OVER.search(mathml):
        logger.warning("this formula has a part that cannot be shown: %s", latex, location=node)
    return ALIGNMENT.sub(r'style="text-align: \1"', VARIANT.sub(_letter, mathml))


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_converted(node.astext(), node))
    raise nodes.SkipNode


def _display(translator: HTML5Translator, node: nodes.math_block) -> None:
    latex = node.astext()
    if r"\\" in latex and r"\begin" not in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    translator.body.append(translator.starttag(node, "div", CLASS="formula"))
    translator.body.append(_converted(latex, node, display="block"))
    if node["number"]:
        number = escape(str(get_node_equation_number(translator, node)))
        translator.body.append(f'<span class="eqno">({number})')
        translator.add_permalink_ref(node, "Link to this equation")
        translator.body.append("</span>")
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the renderer under the name `mathml`."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(_inline, None), block_renderers=(_display, None)
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
