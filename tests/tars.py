"""Tar shards for tests, as WebDataset writes them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **header: object) -> None:
    """One member; `header` are fields of its TarInfo."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in header.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """One shard of members by name."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add(tar, name, content)
    return path


def pack_folder(folder: Path, into: Path, shards: int) -> str:
    """Class folders (or a flat one) as shards with a .cls of the class's name each; their brace pattern."""
    into.mkdir(exist_ok=True)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    each = -(-len(files) // shards)
    for number in range(shards):
        members = []
        for file in files[number * each : (number + 1) * each]:
            name = str(file.relative_to(folder))
            members.append((name, file.read_bytes()))
            if file.parent != folder:
                members.append((str(Path(name).with_suffix(".cls")), file.parent.name.encode()))
        write_shard(into / f"part-{number:03d}.tar", members)
    return str(into / f"part-{{000..{shards - 1:03d}}}.tar")
