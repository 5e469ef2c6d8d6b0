"""One tar shard as it is written: equal images give equal bytes, and every byte is known again from a record.

A header tells a name and a length, and nothing of when, where and by whom the shard was made. Names of more
than 100 bytes or beyond ASCII stand in PAX records before their header.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from ...data.headers import inspect
from ...system.files import atomic_write
from .image import Encoded


class Shard(NamedTuple):
    """A part of a source, and where it goes."""

    folder: Path
    number: int
    rows: range

    @property
    def file(self) -> Path:
        return self.folder / f"shard-{self.number:06d}.tar"

    @property
    def record(self) -> Path:
        return self.folder / "records" / f"shard-{self.number:06d}.json"


class Member(NamedTuple):
    """A file in a shard."""

    name: str
    crc: int
    """CRC-32 of its bytes."""
    size: int
    """In bytes."""
    height: int = 0
    """In pixels as stored; 0, as `width`, of what is no image."""
    width: int = 0


@dataclass
class Record:
    """What was meant to be written to a shard, and why images of its part of the source are not in it."""

    members: list[Member] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    """Reason by row of the source."""
    encoded: int = 0
    """Images that were encoded anew."""
    before: int = 0
    """Bytes of the images in the source, less those left out."""


def write_record(path: Path, record: Record) -> None:
    """Writes a record as JSON after its own checksum, in one step."""
    text = json.dumps(vars(record)).encode()
    with atomic_write(path) as file:
        file.write(b"%08x %b" % (zlib.crc32(text), text))


def read_record(path: Path) -> Record | None:
    """What `write_record` wrote, or None where that is not there or damaged."""
    try:
        checksum, _, text = path.read_bytes().partition(b" ")
    except OSError:
        return None
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    told = json.loads(text)
    members = [Member(*member) for member in told["members"]]
    left_out = {int(row): reason for row, reason in told["left_out"].items()}
    return Record(members, left_out, told["encoded"], told["before"])


def append(file: IO[bytes], name: str, data: Encoded, height: int = 0, width: int = 0) -> Member:
    """Writes one member to the end of a shard."""
    file.write(_header(name, len(data)))
    file.write(data)
    file.write(_padding(len(data)))
    return Member(name, zlib.crc32(data), len(data), height, width)


def close(file: IO[bytes]) -> None:
    """Writes the end of a shard, and all of it to the disk."""
    file.write(_end(file.tell()))
    file.flush()
    os.fsync(file.fileno())


def is_intact(path: Path, members: Iterable[Member]) -> bool:
    """Whether a shard is, byte for byte, what `append` and `close` wrote; read from disk, not from memory.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for member in members:
            header = _header(member.name, member.size)
            if file.read(len(header)) != header:
                return False
            data = file.read(member.size)
            padding = _padding(member.size)
            if zlib.crc32(data) != member.crc or file.read(len(padding)) != padding:
                return False
            if member.height and inspect(io.BytesIO(data), len(data)) != (member.height, member.width, ""):
                return False
        end = _end(file.tell())
        return file.read(len(end) + 1) == end


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _end(size: int) -> bytes:
    """Two empty blocks, and more up to a whole number of records."""
    least = 2 * tarfile.BLOCKSIZE
    return bytes(least + -(size + least) % tarfile.RECORDSIZE)
