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
from typing import IO, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from .headers import inspect
from .listing import EXTENSIONS, LeftOut, number_labels
from .names import pack_names
from .objects import open_object
from .remote import is_remote
from .scan import Scan
from .source import GONE, reason
from .window import Window, of_file

_MOST_HEADER = 1 << 20  # bytes of a long name or of PAX records; more would be read into memory at once
_MOST_LABEL = 1 << 20  # bytes of a label file
_File: TypeAlias = io.RawIOBase | io.BufferedReader
_LABEL_KEYS = ("label", "cls", "class_id")
_PACKED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


@dataclass(frozen=True, eq=False)
class Shard:
    """The usable images of one shard. As arrays, for there may be a hundred million in all."""

    stamp: tuple[int, int]
    """Bytes and mtime_ns, (-1, -1) if it is not there."""
    names: NDArray[np.uint8]
    """(n, L) of the members, NUL-padded."""
    places: NDArray[np.int64]
    """(n, 2) offset and bytes."""
    sizes: NDArray[np.int32]
    """(n, 2) stored height and width."""
    words: list[str]
    """The different labels, words or numbers in figures."""
    word: NDArray[np.int32]
    """(n,) which of the words an image has, -1 for none."""
    left_out: list[tuple[str, str]]
    """Reason by name of member, or by "" for the shard."""


@dataclass
class _Contents:
    """What has been found of a shard so far."""

    stamp: tuple[int, int] = (-1, -1)
    names: list[bytes] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """What an image has in common with its label file: the name up to the first dot of its last part."""
    places: list[tuple[int, int]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    label_of: dict[str, str] = field(default_factory=dict)
    """Label by key."""
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def shard(self) -> Shard:
        words = sorted(set(self.label_of.values()))
        number = {word: i for i, word in enumerate(words)}
        return Shard(
            stamp=self.stamp,
            names=pack_names(self.names) if self.names else np.zeros((0, 1), np.uint8),
            places=np.array(self.places, np.int64).reshape(-1, 2),
            sizes=np.array(self.sizes, np.int32).reshape(-1, 2),
            words=words,
            word=np.array([number.get(self.label_of.get(key, ""), -1) for key in self.keys], np.int32),
            left_out=self.left_out,
        )


def scan_shard(path: str) -> Shard:
    """Looks through one shard, a file or an object. What is whole in a damaged one counts.

    Raises:
        SourceGoneError: The store of the object is gone; never for a bad shard.
    """
    found = _Contents()
    try:
        raw, found.stamp = _open(path)
        with raw:
            file = _Headers(raw)
            start = file.read(tarfile.BLOCKSIZE)
            unpack = next((tool for magic, tool in _PACKED.items() if start.startswith(magic)), None)
            if unpack is not None:
                raise OSError(f"compressed, so that no member can be read alone; unpack it with {unpack}")
            file.seek(0)
            _walk(file, found.stamp[0], found)
    except GONE:
        raise
    except OSError as error:
        found.left_out.append(("", reason(error)))
    return found.shard()


def merge(root: str, shards: list[str], found: list[Shard], kind: str = "shards") -> Scan:
    """The scan of all shards, in their order.

    Args:
        kind: What errors call them.

    Raises:
        ValueError: They hold no usable image, or a label below -1.
    """
    left_out = [
        LeftOut(os.path.join(name, member) if member else name, told)
        for name, shard in zip(shards, found, strict=True)
        for member, told in shard.left_out
    ]
    counts = [len(shard.names) for shard in found]
    if not sum(counts):
        first = "; ".join(f"{path}: {told}" for path, told in left_out[:3]) or "they are empty"
        raise ValueError(
            f"The {len(shards)} {kind} below {root!r} hold no usable image ({first}); check the path."
        )
    labels, classes = _labels(found)
    shard_of = np.repeat(np.arange(len(shards)), counts)
    return Scan(
        root=root,
        paths=_paths(shards, found),
        sizes=np.concatenate([shard.sizes for shard in found]),
        labels=labels,
        classes=classes,
        left_out=left_out,
        holder="ranges",
        files=shards,
        file_stamps=np.array([shard.stamp for shard in found], np.int64),
        places=np.column_stack([shard_of, np.concatenate([shard.places for shard in found])]),
    )


def _labels(found: list[Shard]) -> tuple[NDArray[np.int32], list[str]]:
    """(N,) label of each image, and the classes."""
    words = sorted({shard.words[i] for shard in found for i in np.unique(shard.word).tolist() if i >= 0})
    numbers, classes = number_labels([*words, None])
    label_of = dict(zip(words, numbers, strict=False))
    # No word is number -1, which finds the last of these.
    known = [np.array([*(label_of.get(word, -1) for word in shard.words), -1], np.int32) for shard in found]
    return np.concatenate([k[shard.word] for k, shard in zip(known, found, strict=True)]), classes


def _paths(shards: list[str], found: list[Shard]) -> NDArray[np.uint8]:
    """(N, L) shard.tar/member of each image."""
    starts = [np.frombuffer(os.fsencode(os.path.join(name, "")), np.uint8) for name in shards]
    widest = max(len(start) + shard.names.shape[1] for start, shard in zip(starts, found, strict=True))
    paths = np.zeros((sum(len(shard.names) for shard in found), widest), np.uint8)
    row = 0
    for start, shard in zip(starts, found, strict=True):
        part = paths[row : row + len(shard.names)]
        part[:, : len(start)] = start
        part[:, len(start) : len(start) + shard.names.shape[1]] = shard.names
        row += len(shard.names)
    return paths


def _open(path: str) -> tuple[_File, tuple[int, int]]:
    """The shard as a file, and its stamp."""
    if is_remote(path):
        remote, entry = open_object(path)
        return remote, (entry.size, entry.version)
    if not os.path.isfile(path):
        raise FileNotFoundError if not os.path.exists(path) else OSError("not a regular file")
    local = io.FileIO(path)
    status = os.fstat(local.fileno())
    return local, (status.st_size, status.st_mtime_ns)


class _Headers:
    """A shard as tarfile reads it, without the memory that a made-up header may ask for."""

    def __init__(self, raw: _File) -> None:
        self.raw, self.seek, self.tell = raw, raw.seek, raw.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_HEADER:
            raise tarfile.ReadError("a header of absurd length")
        return self.raw.read(size) or b""


def _walk(file: _Headers, size: int, found: _Contents) -> None:
    """Adds all members, up to the end or to the first damage."""
    seen: set[str] = set()
    last, tar = -1, None
    try:
        tar = tarfile.open(fileobj=cast(IO[bytes], file), mode="r:")  # noqa: SIM115, for `file` is closed by the caller
        some = tar.firstmember is not None  # type: ignore[attr-defined]  # if not, Python 3.10 seeks before it
        while some and (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # millions of them would take gigabytes
            if member.offset <= last:
                raise tarfile.ReadError("a header that leads back")
            last = member.offset
            _add(file.raw, member, size, seen, found)
        file.seek(tar.offset)
        whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        if whole and file.read(max(0, min(size - file.tell(), _MOST_HEADER))).strip(b"\0"):
            told = f"ends at byte {tar.offset}; what follows, as a tar that was appended, is not read"
            found.left_out.append(("", told))
    except GONE:
        raise
    except Exception:  # tarfile's own, and whatever else it stumbles over in a damaged header
        whole = False
    if not whole:
        told = (
            "no tar"
            if tar is None
            else f"damaged or cut off at byte {tar.offset}; what stands before is used"
        )
        found.left_out.append(("", told))


def _add(
    raw: _File,
    member: tarfile.TarInfo,
    size: int,
    seen: set[str],
    found: _Contents,
) -> None:
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
    elif member.size > _MOST_LABEL:
        refused = f"longer than the {_MOST_LABEL} bytes of a label file that are read"
    folder, base = os.path.split(name)
    key = os.path.join(folder, base.partition(".")[0])
    window = io.BufferedReader(Window(of_file(raw), member.offset_data, member.size))
    if not refused and ending in EXTENSIONS:
        height, width, refused = inspect(window, member.size)
        if not refused:
            found.names.append(os.fsencode(name))
            found.keys.append(key)
            found.places.append((member.offset_data, member.size))
            found.sizes.append((height, width))
    elif not refused and (word := _label(window.read(_MOST_LABEL), ending)) is not None:
        if ending == ".cls":
            found.label_of[key] = word
        else:
            found.label_of.setdefault(key, word)
    if refused:
        told = "".join(letter if letter.isprintable() else "?" for letter in name)
        found.left_out.append((told, refused))


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
