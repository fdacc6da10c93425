"""How the documentation is built: sphinx-build -W docs docs/_build/html."""

from __future__ import annotations

from typing import Any

try:
    import furo  # noqa: F401 - the theme, by its name below
    import myst_parser  # noqa: F401
    from docutils import nodes
    from latex2mathml.converter import convert

    import privrec
except ImportError as error:
    raise SystemExit(
        f"{error}; what builds the documentation is installed in a clone of the repository by: "
        "pip install -c constraints.txt -e '.[docs]'"
    ) from None

project = "privrec"
author = "the privrec authors"
release = version = privrec.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
html_math_renderer = "mathml"
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"privrec {release}"

# Links to headings, as they work on a code host too.
myst_heading_anchors = 3

# The extra is not installed where the documentation is built.
autodoc_mock_imports = ["flwr"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def setup(app: Any) -> None:
    """Write formulas as MathML, which browsers draw by themselves: pages load no script for it."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))


def _mathml(node: nodes.Element, display: str) -> str:
    return convert(node.astext().replace(r"\_", "_"), display=display)  # as \texttt{} has it


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(_mathml(node, "inline"))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f"<div class='math'>{_mathml(node, 'block')}</div>")
    raise nodes.SkipNode
