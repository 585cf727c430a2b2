"""Sphinx settings: `python -m sphinx -W --keep-going -b html docs docs/_build`."""

import re
from typing import Any

from docutils import nodes
from jax.typing import ArrayLike
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.typing import stringify_annotation
from sphinx.writers.html5 import HTML5Translator

project = "ragjax"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "code"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# "Example" is napoleon's own; it becomes a heading like these.
napoleon_custom_sections = ["Gradients", ("References", "notes_style")]

html_theme = "furo"
html_title = "ragjax"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["ragjax.css"]
html_math_renderer = "mathml"


def mathml(translator: HTML5Translator, node: nodes.Element, display: str) -> str:
    r"""Converts a formula to MathML, which browsers draw without any script or font from outside.

    Blocks are split where the author put a blank line or `\\`, since browsers do not break lines.
    """
    formula = re.sub(r"\\arg\b", r"\\operatorname{arg}", node.astext().strip())
    one = display == "inline" or r"\begin" in formula
    parts = [formula] if one else re.split(r"\\\\|\n\s*\n", formula)
    drawn = "".join(convert(part.strip(), display=display) for part in parts)
    unknown = re.findall(r"<mi>(\\\w+|&)</mi>", drawn)
    if unknown:
        logging.getLogger(__name__).warning(
            "cannot draw %s in: %s", ", ".join(unknown), formula, location=node
        )
    return drawn


def visit_inline(translator: HTML5Translator, node: nodes.Element) -> None:
    """Writes a formula within a line."""
    translator.body.append(mathml(translator, node, "inline"))
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: nodes.Element) -> None:
    """Writes a displayed formula."""
    translator.body.append(f'<div class="formula">{mathml(translator, node, "block")}</div>\n')
    raise nodes.SkipNode


def shorten_types(app: Sphinx, what: str, name: str, obj: object, options: object, *parts: str):
    """Writes `ArrayLike` instead of all that it may be."""
    modes: list[Any] = ["fully-qualified", "smart"]
    for long in [stringify_annotation(ArrayLike, mode) for mode in modes]:
        parts = tuple(part and part.replace(long, "ArrayLike") for part in parts)
    return parts


def setup(app: Sphinx) -> None:
    """Registers the above; `html_math_renderer` names the renderer."""
    app.connect("autodoc-process-signature", shorten_types)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
