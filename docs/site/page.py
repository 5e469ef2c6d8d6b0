"""A page of the site before it is one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Page(NamedTuple):
    """Markdown or reStructuredText, by the ending of its path."""

    path: str
    """Below the root of the site's sources."""
    text: str
    top: bool = False
    """Whether the start page leads to it, and not another page of the reference."""


def write(page: Page, folder: Path) -> None:
    """Writes a page below a folder."""
    file = folder / page.path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page.text, encoding="utf-8")


def first_line(thing: Any, name: str) -> str:
    """The first sentence of what a docstring says.

    Raises:
        ValueError: There is no docstring.
    """
    text = inspect.getdoc(thing) if not isinstance(thing, str) else thing
    if not text or not text.strip():
        raise ValueError(f"{name} has no docstring; write what it is in one sentence")
    return " ".join(text.split("\n\n")[0].split())


def heading(text: str, line: str = "=") -> str:
    """A title of reStructuredText."""
    return f"{text}\n{line * len(text)}\n\n"


def children(paths: Sequence[str]) -> str:
    """What makes pages the children of this one, in reStructuredText."""
    return ".. toctree::\n   :hidden:\n   :titlesonly:\n\n" + "".join(f"   {path}\n" for path in paths)
