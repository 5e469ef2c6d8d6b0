"""Builds the documentation as a web site that needs no network: `python docs/site/build.py build/site`.

Every warning is an error: a link to nowhere, a public name without a docstring, a page that nothing leads to.
What is written by hand are README.md, docs/*.md and the project's other pages; the reference is made from the
code, so that no list of names, keys or options can fall behind it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import arrays  # noqa: F401, before all others
import commands
import configuration
import networks
import python_names
from files import written_pages
from page import Page, write
from sphinx.cmd.build import main as sphinx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def build(out: Path, sources: Path) -> int:
    """Writes all pages to an empty folder and has Sphinx make the site; its exit code."""
    start, guides, project, files = written_pages(ROOT)
    reference = [
        *python_names.pages(),
        *commands.pages(),
        *configuration.pages(),
        *networks.pages(),
    ]
    trees = {"How to": guides, "Reference": [page for page in reference if page.top], "Project": project}
    for page in [*guides, *project, *files, *reference]:
        write(page, sources)
    write(Page("index.md", start.text + "".join(_tree(*tree) for tree in trees.items())), sources)
    shutil.rmtree(out, ignore_errors=True)
    # Warnings are errors, all are told; nothing is kept of an earlier build.
    words = ["-W", "--keep-going", "-q", "-E", "-d", str(sources / ".doctrees"), "-c", str(HERE)]
    return sphinx([*words, str(sources), str(out)])


def _tree(caption: str, pages: Sequence[Page]) -> str:
    names = "\n".join(page.path for page in pages)
    return f"\n```{{toctree}}\n:hidden:\n:titlesonly:\n:caption: {caption}\n\n{names}\n```\n"


def main(arguments: Sequence[str]) -> int:
    """Build into the folder that is named."""
    (out,) = arguments
    with tempfile.TemporaryDirectory() as sources:
        code = build(Path(out).resolve(), Path(sources))
    if code == 0:
        print(f"{out}/index.html")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
