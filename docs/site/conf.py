"""Sphinx's settings; `build.py` writes the pages and calls it."""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Any

project = "dali_views"
author = "The dali_views developers"
copyright = author
release = version = installed("dali-views")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns: list[str] = []
# What is indented in a page is a command or a drawing.
highlight_language = "none"
# `RegionTable` in a docstring is a link to its page, `batch.index` is code.
default_role = "py:obj"
smartquotes_action = "D"  # dashes; quotes are often code
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["attrs_inline", "deflist"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
# So that "rank, world: ..." may tell of two arguments at once.
napoleon_use_param = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"dali_views {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_use_index = html_domain_indices = False
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_last_updated_fmt = None


_COLON = "\N{RATIO}"


def _plain_signature(
    app: Any, what: str, name: str, object: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Of a class that others build or implement, what one could call it with tells nothing."""
    hidden = what == "class" and ("<factory>" in (signature or "") or signature == "(*args, **kwargs)")
    return ("", returns) if hidden else None


def _hide_colon(app: Any, what: str, name: str, object: Any, options: Any, lines: list[str]) -> None:
    """Napoleon would take what stands before the first colon of an attribute's docstring for its type."""
    if what in ("attribute", "property"):
        lines[:] = [line.replace(":", _COLON) for line in lines]


def _show_colon(app: Any, what: str, name: str, object: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def setup(app: Any) -> None:
    """Sphinx calls this; Napoleon works at priority 500."""
    app.connect("autodoc-process-signature", _plain_signature)
    app.connect("autodoc-process-docstring", _hide_colon, priority=400)
    app.connect("autodoc-process-docstring", _show_colon, priority=600)
