"""The documentation as a site: Sphinx, with pages in Markdown (MyST) and an executed notebook."""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]
# The tutorial's kernel is another process; it runs the code of this copy too.
os.environ["PYTHONPATH"] = str(DOCS.parent)

import settings_table  # noqa: E402  found by the line above

import soft_jax  # noqa: E402

project = "soft_jax"
author = "The soft_jax authors"
release = version = soft_jax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]

# A link that leads nowhere is a warning, and `sphinx-build -W` fails on it.
nitpicky = True
# Types in signatures: not all of ours have a place here, and other packages' sites are not asked.
nitpick_ignore_regex = [("py:class", ".*")]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

nb_execution_mode = "force"  # whenever the page is read, so that it shows what the code does today
nb_execution_raise_on_error = True
nb_execution_timeout = 600  # seconds for a cell
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"

html_theme = "furo"
html_title = f"soft_jax {release}"


def setup(app):
    """Fill the generated table into the page of settings."""
    app.connect("source-read", settings_table.fill_page)
