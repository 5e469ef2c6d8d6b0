"""Which images tar shards hold: where each lies, how large it is, of which class.

Only headers of members, headers and ends of images, and label files are read, with seeks in between; other
members (pickles, NumPy files, text) are neither read nor decoded.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .index_file import pack_names
from .scan import inspect
from .scan_cache import stamp_of
from .source import reason
from .sources import EXTENSIONS, LeftOut, number_labels

_MOST_HEADER = 1 << 20  # bytes of a long name or of PAX records; more would be read into memory at once
_MOST_LABEL = 1 << 16  # bytes of a label file
_LABEL_KEYS = ("label", "cls", "class_id")
_PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


@dataclass(frozen=True, eq=False)
class ShardScan:
    """The images of shards after the scan, and what the shards looked like then; see `SampleIndex`."""

    root: str
    paths: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    labels: NDArray[np.int32]
    classes: list[str]
    left_out: list[LeftOut]
    shards: list[str]
    shard_stamps: NDArray[np.int64]
    members: NDArray[np.int64]

    def holds(self) -> bool:
        """Whether all shards still look the same."""
        stamps = self.shard_stamps.tolist()
        paths = [os.path.join(self.root, name) for name in self.shards]
        return all(stamp_of(path) == tuple(stamp) for path, stamp in zip(paths, stamps, strict=True))


class Member(NamedTuple):
    """An image in a shard."""

    name: str
    key: str
    """What it has in common with its label file: the name up to the first dot of its last part."""
    place: tuple[int, int]
    """Offset and bytes."""
    size: tuple[int, int]
    """Stored height and width."""


@dataclass
class Contents:
    """What one shard holds."""

    stamp: tuple[int, int] = (-1, -1)
    images: list[Member] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)
    """Label by key, a word or a number in figures."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Reason by name of member, or by "" for the shard."""


def scan_shard(path: str) -> Contents:
    """Looks through one shard; never raises for a bad one. What is whole in a damaged one counts."""
    found = Contents()
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError if not os.path.exists(path) else OSError("not a regular file")
        with _Headers(path) as file:
            status = os.fstat(file.fileno())
            found.stamp = (status.st_size, status.st_mtime_ns)
            start = file.read(tarfile.BLOCKSIZE)
            unpack = next((tool for magic, tool in _PACKED.items() if start.startswith(magic)), None)
            if unpack is not None:
                raise OSError(f"compressed, so that no member can be read alone; unpack it with {unpack}")
            file.seek(0)
            _walk(file, status.st_size, found)
    except OSError as error:
        found.left_out.append(("", reason(error)))
    return found


def merge(root: str, shards: list[str], contents: list[Contents]) -> ShardScan:
    """The scan of all shards, in their order.

    Raises:
        ValueError: They hold no usable image, or a label below -1.
    """
    left_out = [
        LeftOut(os.path.join(shard, name) if name else shard, told)
        for shard, found in zip(shards, contents, strict=True)
        for name, told in found.left_out
    ]
    rows = [(i, found, image) for i, found in enumerate(contents) for image in found.images]
    if not rows:
        first = "; ".join(f"{path}: {told}" for path, told in left_out[:3])
        raise ValueError(
            f"The {len(shards)} shards below {root!r} hold no usable image ({first}); check the path."
        )
    labels, classes = number_labels([found.words.get(image.key) for _, found, image in rows])
    return ShardScan(
        root=root,
        paths=pack_names([os.fsencode(os.path.join(shards[i], image.name)) for i, _, image in rows]),
        sizes=np.array([image.size for _, _, image in rows], np.int32),
        labels=np.array(labels, np.int32),
        classes=classes,
        left_out=left_out,
        shards=shards,
        shard_stamps=np.array([found.stamp for found in contents], np.int64),
        members=np.array([(i, *image.place) for i, _, image in rows], np.int64),
    )


class _Headers(io.FileIO):
    """A shard as tarfile reads it, without the memory that a made-up header may ask for."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError("a header of absurd length")
        return super().read(size) or b""


def _walk(file: _Headers, size: int, found: Contents) -> None:
    """Adds all members, up to the end or to the first damage."""
    seen: set[str] = set()
    last, tar = -1, None
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115, for `file` is closed by the caller
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # millions of them would take gigabytes
            if member.offset <= last:
                raise tarfile.ReadError("a header that leads back")
            last = member.offset
            _add(file.fileno(), member, size, seen, found)
        file.seek(tar.offset)
        whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except Exception:  # tarfile's own, and whatever else it stumbles over in a damaged header
        whole = False
    if not whole:
        told = (
            "no tar"
            if tar is None
            else f"damaged or cut off at byte {tar.offset}; what stands before is used"
        )
        found.left_out.append(("", told))


def _add(handle: int, member: tarfile.TarInfo, size: int, seen: set[str], found: Contents) -> None:
    name = os.path.normpath(member.name)
    ending = os.path.splitext(name)[1].lower()
    if member.isdir():
        return
    refused = _refusal(member, name, size)
    if refused or ending in EXTENSIONS:
        if not refused and name in seen:
            refused = "stands twice in its shard; the first time counts"
        seen.add(name)
    elif ending not in (".cls", ".json"):
        return
    folder, base = os.path.split(name)
    key = os.path.join(folder, base.partition(".")[0])
    window = io.BufferedReader(_Window(handle, member.offset_data, member.size))
    if not refused and ending in EXTENSIONS:
        height, width, refused = inspect(window, member.size)
        if not refused:
            place = (member.offset_data, member.size)
            found.images.append(Member(name, key, place, (height, width)))
    elif not refused and (word := _label(window.read(_MOST_LABEL), ending)) is not None:
        if ending == ".cls":
            found.words[key] = word
        else:
            found.words.setdefault(key, word)
    if refused:
        found.left_out.append((name.replace("\0", "?"), refused))


def _refusal(member: tarfile.TarInfo, name: str, size: int) -> str:
    """Why a member must not be read, or ""."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return "its name leads out of the shard"
    if member.issym() or member.islnk():
        return "a link"
    if member.issparse():
        return "a sparse file, whose bytes do not lie in one piece"
    if not member.isreg():
        return "no regular file"
    if member.size < 0 or member.offset_data + member.size > size:
        return "cut off with its shard"
    return ""


def _label(content: bytes, ending: str) -> str | None:
    """The label that a .cls or .json file gives, or None."""
    try:
        if ending == ".cls":
            return content.decode().strip() or None
        told: Any = json.loads(content)
        numbers = [told[key] for key in _LABEL_KEYS if type(told.get(key)) is int]
        return str(numbers[0]) if numbers else None
    except (AttributeError, RecursionError, ValueError):
        return None


class _Window(io.RawIOBase):
    """One member as a file, read by offsets."""

    def __init__(self, handle: int, offset: int, size: int) -> None:
        self._handle, self._offset, self._size, self._at = handle, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if self._at < 0:
            raise ValueError("sought before the start")
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        read = os.preadv(self._handle, [memoryview(buffer)[:wanted]], self._offset + self._at)
        self._at += read
        return read
