"""Settings of Sphinx: `make docs` builds a site that needs no network. Every warning is an error.

README.md, docs/*.md and the project's other pages are written by hand. Sphinx's extensions make the reference
from the code, so that no list of keys, members or options can fall behind it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy.typing

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

project = "dali_views"
author = copyright = "The dali_views developers"
release = version = installed("dali-views")

extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon",
    "sphinx.ext.viewcode", "sphinxcontrib.autoprogram", "sphinxcontrib.autodoc_pydantic",
]  # fmt: skip
root_doc = "README"
include_patterns = [
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "configs/README.md", "docs/*.md", "docs/*.ipynb",
    "docs/reference/**.rst",
]  # fmt: skip
source_suffix = {".rst": "restructuredtext", ".md": "markdown", ".ipynb": "markdown"}
# What is indented in a page is a command or a drawing.
highlight_language = "none"
# `RegionTable` in a docstring is a link to its page, `batch.index` is code.
default_role = "py:obj"
smartquotes_action = "D"  # dashes; quotes are often code
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["attrs_inline", "deflist"]
myst_heading_anchors = 4

templates_path = [str(ROOT / "docs/site/templates")]
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_use_legacy_class_based = True  # which autodoc_pydantic 2.2 extends
autodoc_default_options = {"exclude-members": "__init__, __new__"}
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Arguments of several constructors", "params_style")]
# So that "rank, world: ..." may tell of two arguments at once.
napoleon_use_param = napoleon_use_rtype = False

autodoc_pydantic_model_show_json = False
autodoc_pydantic_model_show_config_summary = False
autodoc_pydantic_model_show_validator_summary = False
autodoc_pydantic_model_show_validator_members = False
autodoc_pydantic_model_show_field_summary = False
autodoc_pydantic_model_hide_paramlist = True
autodoc_pydantic_field_list_validators = False
autodoc_pydantic_model_signature_prefix = "section"
autodoc_pydantic_field_signature_prefix = "key"

html_theme = "furo"
html_title = f"dali_views {release}"
html_static_path = ["static"]
html_extra_path = ["index.html"]
html_css_files = ["site.css"]
html_use_index = html_domain_indices = False
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_last_updated_fmt = None

_Kind = TypeVar("_Kind")


class NDArray(Generic[_Kind]):
    """NumPy's own is an alias, which would appear as ndarray[tuple[Any, ...], dtype[float32]]."""


NDArray.__module__ = "numpy.typing"
numpy.typing.NDArray = NDArray  # type: ignore[misc, assignment]


_PICTURE = re.compile(r"<picture>\s*<source [^>]*srcset=\"([^\"]+)\">\s*<img ([^>]*)>\s*</picture>")


def _adapt(app: Any, page: str, source: list[str]) -> None:
    """Differs from what GitHub shows: links to folders are text, the first page leads to all others, pictures
    follow the theme of the site, and a notebook is a page with its outputs."""

    def linked(link: re.Match[str]) -> str:
        return link[1] if (ROOT / page).parent.joinpath(link[2]).is_dir() else link[0]

    def themed(found: re.Match[str]) -> str:
        given = dict(re.findall(r'(\w+)="([^"]*)"', found[2]))
        wide = f" width={given['width']}px" if "width" in given else ""
        files = {"light": given["src"], "dark": found[1]}
        return "\n\n".join(f"![{given['alt']}]({file}){{.only-{name}{wide}}}" for name, file in files.items())

    if Path(app.env.doc2path(page)).suffix == ".ipynb":
        source[0] = "\n\n".join(map(_cell, json.loads(source[0])["cells"]))
    source[0] = _PICTURE.sub(themed, source[0])
    source[0] = re.sub(r"\[([^\]]+)\]\(([^):#]+)\)", linked, source[0])
    if page == root_doc:
        source[0] += Path(__file__).with_name("contents.md").read_text(encoding="utf-8")


def _cell(cell: dict[str, Any]) -> str:
    """A notebook's cell as Markdown."""
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return text
    parts = [f"```python\n{text}\n```"]
    for output in cell["outputs"]:
        if jpeg := output.get("data", {}).get("image/jpeg"):
            parts.append(f'<img src="data:image/jpeg;base64,{jpeg}" alt="what the cell above shows">')
        else:
            parts.append(f"```none\n{''.join(output['text'])}```")
    return "\n\n".join(parts)


def _plain_signature(
    app: Any, what: str, name: str, object: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """The signature of a class that is not made by a call says nothing."""
    hidden = what == "class" and ("<factory>" in (signature or "") or signature == "(*args, **kwargs)")
    return ("", returns) if hidden else None


def _hide_colon(app: Any, what: str, name: str, object: Any, options: Any, lines: list[str]) -> None:
    """Napoleon would take what stands before the first colon of an attribute's docstring for its type."""
    if what in ("attribute", "property", "pydantic_field"):
        lines[:] = [line.replace(":", "\N{RATIO}") for line in lines]


def _show_colon(app: Any, what: str, name: str, object: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace("\N{RATIO}", ":") for line in lines]


def setup(app: Any) -> None:
    """Sphinx calls this; Napoleon works at priority 500."""
    shutil.rmtree(ROOT / "docs/reference/generated", ignore_errors=True)  # pages of names that are gone
    app.connect("source-read", _adapt)
    app.connect("autodoc-process-signature", _plain_signature)
    app.connect("autodoc-process-docstring", _hide_colon, priority=400)
    app.connect("autodoc-process-docstring", _show_colon, priority=600)
