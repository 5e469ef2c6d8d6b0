"""Reads a Dockerfile and a .dockerignore: as much of both as this project's own use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

__all__ = ["context_files", "fill_in", "ignored", "instructions", "options"]


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions in their order, as (name, rest of the line), without comments, on one line each."""
    kept = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(kept))
    pairs = (line.strip().split(None, 1) for line in joined.splitlines())
    return [(name.upper(), rest) for name, rest in pairs]


def fill_in(text: str, variables: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` replaced, as Docker does everywhere but in RUN and CMD."""
    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", lambda found: variables.get(found[1] or found[2], ""), text)


def options(rest: str) -> tuple[dict[str, str], str]:
    """The leading `--name=value` of an instruction and what follows them."""
    found: dict[str, str] = {}
    while match := re.match(r"--([\w-]+)=(\S+)\s+", rest):
        found[match[1]] = match[2]
        rest = rest[match.end() :]
    return found, rest


def ignored(path: str, patterns: str) -> bool:
    """Whether a .dockerignore keeps a file out: the last pattern that fits it or a folder above it counts."""
    above = path.split("/")
    tried = ["/".join(above[:count]) for count in range(1, len(above) + 1)]
    out = False
    for line in patterns.splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            keeps = pattern.startswith("!")
            fits = re.compile(_expression(pattern.lstrip("!").strip("/")))
            if any(fits.fullmatch(part) for part in tried):
                out = not keeps
    return out


def _expression(pattern: str) -> str:
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(pieces.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))


def context_files(root: Path, source: str) -> list[Path]:
    """Files below `root` that COPY takes for `source`, a file or a folder, after .dockerignore."""
    patterns = (root / ".dockerignore").read_text(encoding="utf-8")
    start = root / source
    files = [start] if start.is_file() else sorted(file for file in start.rglob("*") if file.is_file())
    return [file for file in files if not ignored(file.relative_to(root).as_posix(), patterns)]
