"""How the documentation is built: sphinx-build -W docs docs/_build/html."""

from __future__ import annotations

import privrec

project = "privrec"
author = "the privrec authors"
release = version = privrec.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
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
