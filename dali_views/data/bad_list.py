"""The list of files that cannot be used: a text file with a line `path<tab>reason` for each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..system.files import PathLike, atomic_write
from .remote import below


def save(file: PathLike, reasons: Mapping[str, str]) -> None:
    """Write reasons by path, in one step."""
    with atomic_write(file) as draft:
        for path, reason in reasons.items():
            start = "./" if path[:1] == "#" else ""  # a line with # is a comment
            draft.write(os.fsencode(f"{start}{path}\t{' '.join(reason.split())}\n"))


def load(file: PathLike) -> dict[str, str]:
    """Reasons by path; a line without a tab is a path alone. Blank lines and lines with # are skipped."""
    if not os.path.isfile(file):
        raise FileNotFoundError(f"The list {os.fspath(file)!r} does not exist; check the path.")
    lines = [line.rstrip("\r") for line in os.fsdecode(Path(file).read_bytes()).split("\n") if line.strip()]
    pairs = [line.rpartition("\t") if "\t" in line else (line, "", "") for line in lines if line[0] != "#"]
    return {path: reason.strip() or "on the list of files to leave out" for path, _, reason in pairs}


def load_below(file: PathLike, root: str) -> dict[str, str]:
    """Reasons by path relative to `root`."""
    listed, start = load(file), os.path.join(root, "")
    # A table or an environment may have names like ./a.jpg, which a list of them has, too.
    alike = {path.removeprefix(start): reason for path, reason in listed.items()}
    return {below(path, root): reason for path, reason in listed.items()} | alike
