"""The list of files that cannot be used: a text file with a line for each.

    cats/0001.jpg<tab>truncated
    {"path": "cats/one\\ntwo.jpg", "reason": "truncated"}

A line is `path<tab>reason`, or an object of JSON for a path that would not come back from such a line. Lists
made by hand may have paths alone, blank lines, and comments, which begin with #.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ..system.files import PathLike, atomic_write
from .remote import below


def save(file: PathLike, reasons: Mapping[str, str]) -> None:
    """Write reasons by path, in one step."""
    with atomic_write(file) as draft:
        for path, reason in reasons.items():
            line = f"{path}\t{' '.join(reason.split())}"
            if any(mark in path for mark in "\n\r\t") or path[:1] in ("#", "{") or not path.strip():
                line = json.dumps({"path": path, "reason": reason})
            draft.write(os.fsencode(line + "\n"))


def load(file: PathLike) -> dict[str, str]:
    """Reasons by path."""
    if not os.path.isfile(file):
        raise FileNotFoundError(f"The list {os.fspath(file)!r} does not exist; check the path.")
    lines = [line.rstrip("\r") for line in os.fsdecode(Path(file).read_bytes()).split("\n") if line.strip()]
    pairs = [_pair(line) for line in lines if line[0] != "#"]
    return {path: reason.strip() or "on the list of files to leave out" for path, reason in pairs}


def _pair(line: str) -> tuple[str, str]:
    """Path and reason of a line; the reason has no tab."""
    if line[0] == "{":
        try:
            match json.loads(line):
                case {"path": str(path), "reason": str(reason)}:
                    return path, reason
        except ValueError:
            pass  # a name may begin so
    path, _, reason = line.rpartition("\t") if "\t" in line else (line, "", "")
    return path, reason


def load_below(file: PathLike, root: str) -> dict[str, str]:
    """Reasons by path relative to `root`."""
    listed, start = load(file), os.path.join(root, "")
    # A table or an environment may have names like ./a.jpg, which a list of them has, too.
    alike = {path.removeprefix(start): reason for path, reason in listed.items()}
    return {below(path, root): reason for path, reason in listed.items()} | alike
