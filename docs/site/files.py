"""Pages that are written by hand, and those of the repository's files that they point to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from page import Page

PROJECT = ("configs/README.md", "CHANGELOG.md", "CONTRIBUTING.md")
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sbatch": "bash"}


def written_pages(root: Path) -> tuple[Page, list[Page], list[Page], list[Page]]:
    """Start page, docs/*.md in the order in which the README names them, the project's pages, its files."""
    written = ["README.md", *PROJECT, *sorted(f"docs/{file.name}" for file in (root / "docs").glob("*.md"))]
    texts = {path: (root / path).read_text(encoding="utf-8") for path in written}
    named = [_target("README.md", link) for link in _LINK.findall(texts["README.md"])]
    guides = [path for path in written if path.startswith("docs/")]
    guides.sort(key=lambda path: named.index(path) if path in named else len(named))
    files = {
        target: root / target
        for path, text in texts.items()
        for target in (_target(path, link) for link in _LINK.findall(text))
        if target not in texts and (root / target).exists()
    }
    for folder in [file for file in files.values() if file.is_dir()]:
        files |= {str(file.relative_to(root)): file for file in folder.iterdir() if file.is_file()}
    pages = {path: Page(path, _relinked(path, text, files)) for path, text in texts.items()}
    return (
        pages["README.md"],
        [pages[path] for path in guides],
        [pages[path] for path in PROJECT],
        list(_of_files(files)),
    )


def _target(page: str, link: str) -> str:
    """Where a link of a page leads to, from the root."""
    return os.path.normpath(os.path.join(os.path.dirname(page), link))


def _relinked(page: str, text: str, files: dict[str, Path]) -> str:
    """Links to files and folders lead to their pages."""

    def other(match: re.Match[str]) -> str:
        found = files.get(_target(page, match[1]))
        return match[1] if found is None else f"{match[1]}{'/index' if found.is_dir() else ''}.md"

    return _LINK.sub(other, text)


def _of_files(files: dict[str, Path]) -> Iterator[Page]:
    """A page that shows each file, and one that lists each folder."""
    for path, file in files.items():
        if file.is_dir():
            held = sorted(entry.name for entry in file.iterdir() if entry.is_file())
            lines = "".join(f"- [{name}]({name}.md)\n" for name in held)
            yield Page(f"{path}/index.md", f"---\norphan: true\n---\n# {path}\n\n{lines}")
            continue
        name, language = file.name, _LANGUAGES.get(file.suffix, "none")
        yield Page(path, file.read_text(encoding="utf-8"))
        yield Page(
            f"{path}.md",
            f"---\norphan: true\n---\n# {path}\n\n{{download}}`Download <{name}>`\n\n"
            f"```{{literalinclude}} {name}\n:language: {language}\n```\n",
        )
