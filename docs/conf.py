"""Sphinx's configuration: `make docs` builds the site into site/."""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pages  # noqa: E402

import clara_jax  # noqa: E402

pages.write(HERE)

project = "clara_jax"
copyright = "the clara_jax authors"
version = release = clara_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "clara_jax"
autodoc_typehints = "none"  # shapes are in the text
autodoc_member_order = "bysource"
napoleon_custom_sections = []
# Docstrings are written for the eye: tables and indented lines in them.
suppress_warnings = ["myst.header", "docutils", "ref.python"]
