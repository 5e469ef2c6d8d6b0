"""Tar shards: which ones a pattern means, and which images they hold, where, how large, of which class.

Only headers of members, headers and ends of images, and label files are read, with seeks in between.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import IO, Any, NamedTuple, cast

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray
from typing_extensions import Unpack

from ..system.files import PathLike, pack_names
from .headers import inspect, look_through, size_of
from .listing import EXTENSIONS, number_labels
from .remote import absolute, as_url, below, bucket_of, content, is_remote, open_object
from .scan import LeftOut, Options, Scan, ScanCache
from .source import GONE, open_stamped, reason, window

SHARD = re.compile(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2|txz)\*?$")
TABLE = re.compile(r"\.(parquet|pq|arrow|feather)\*?$")
_KINDS = {SHARD: ("shard", "*.tar"), TABLE: ("table", "*.parquet")}
_LIST_ENDINGS = (".txt", ".tsv", ".lst")
_MOST = 1 << 20  # shards that a pattern may mean; bytes of a label file, and of a long name or PAX records
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_LABEL_KEYS = ("label", "cls", "class_id")
_SHARDS, _REQUESTS = 4, 16  # shards that threads scan at a time: more wait for the interpreter; in a store
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


def is_list(path: PathLike) -> bool:
    """Whether the name is one of a text file; in a store, by its ending."""
    return os.path.isfile(path) or (is_remote(path) and os.fspath(path).lower().endswith(_LIST_ENDINGS))


def list_shards(pattern: PathLike | Sequence[PathLike], ending: re.Pattern[str] = SHARD) -> list[str]:
    """Absolute paths of the shards in the order given, each once; see `SampleIndex.from_shards`.

    Their names have this ending, `SHARD` or `TABLE`; a file of another name lists them.
    """
    given = [pattern] if isinstance(pattern, (str, os.PathLike)) else list(pattern)
    found = dict.fromkeys(absolute(path) for one in given for path in _expand(os.fspath(one), ending))
    kind, example = _KINDS[ending]
    for path in found:
        if os.path.isdir(path) and not ending.search(os.path.basename(path)):
            raise IsADirectoryError(
                f"{path!r} is a folder; name the {kind}s in it, as {os.path.join(path, example)!r}."
            )
    if not any(is_remote(path) or os.path.exists(path) for path in found):
        named = ", ".join(repr(os.fspath(one)) for one in given[:3])
        raise FileNotFoundError(
            f"There is no {kind} {named}; check the path or the pattern. A file whose name does not end as "
            f"{example!r} does is read as a list of {kind}s."
        )
    return list(found)


def _expand(pattern: str, ending: re.Pattern[str]) -> Iterator[str]:
    if is_list(pattern) and not ending.search(os.path.basename(pattern)):
        for line in lines_of(pattern):
            yield from _named(line if is_remote(line) else os.path.join(os.path.dirname(pattern), line))
    else:
        yield from _named(pattern)


def lines_of(path: PathLike) -> Iterator[str]:
    """Paths that a text file names."""
    with io.BytesIO(content(path)) if is_remote(path) else open(path, "rb") as file:
        for line in file:
            if (text := os.fsdecode(line).strip()) and not text.startswith("#"):
                yield text


def _named(pattern: str) -> Iterator[str]:
    """The paths that a name with braces and wildcards stands for; without wildcards they need not exist."""
    if is_remote(pattern):
        pattern = as_url(pattern)
    if os.path.exists(pattern):
        yield pattern
        return
    # Checked before, for braceexpand makes lists of all numbers.
    wide = any(abs(int(first) - int(last)) >= _MOST for first, last in _RANGE.findall(pattern))
    names = [] if wide else list(islice(braceexpand(pattern, escape=False), _MOST + 1))
    if wide or len(names) > _MOST:
        raise ValueError(f"The pattern {pattern!r} stands for more than {_MOST} shards; check its numbers.")
    for name in names:
        if not glob.has_magic(name):
            yield name
        elif is_remote(name):
            bucket, key = bucket_of(name)
            yield from (f"{bucket.url}/{one.name}" for one in bucket.glob(key))
        else:
            yield from sorted(glob.glob(name))


def scan_shards(pattern: PathLike | Sequence[PathLike], **options: Unpack[Options]) -> Scan:
    """The images in tar shards; if no shard has changed, none is opened."""
    paths = list_shards(pattern)
    remote = {is_remote(path) for path in paths}
    root = os.path.commonpath([os.path.dirname(path) for path in paths]) if len(remote) == 1 else ""
    if True in remote and not is_remote(root):
        raise ValueError("The shards do not lie in one bucket; copy them into one, or index them apart.")
    root = as_url(root) if True in remote else root
    shards = [below(path, root) for path in paths]
    place = ScanCache(root, ["shards", shards], Scan, options)
    if place.kept is not None and place.kept.holds():
        return place.kept
    processes, threads = (0, _REQUESTS) if True in remote else (options.get("processes"), _SHARDS)
    progress, size = options.get("progress", True), size_of(paths)
    found = look_through(scan_shard, paths, size, processes, "shards", progress, threads)
    return place.keep(merge(root, shards, found))


class Shard(NamedTuple):
    """The n usable images of one shard (or table). As arrays: there may be a hundred million in all."""

    stamp: tuple[int, int]  # bytes and mtime_ns, (-1, -1) if it is not there
    names: NDArray[np.bytes_]  # (n,) of the members
    labels: NDArray[np.bytes_]  # (n,) as text, empty if unknown
    numbers: NDArray[np.int64]  # (n, 4) offset, bytes (or what else says the place), height, width
    left_out: list[tuple[str, str]]  # name of member, or "" for the shard, and reason


class _Found:
    """The contents of a shard so far. A key, the name up to the first dot, joins image and label file."""

    def __init__(self) -> None:
        self.images: dict[str, tuple[str, int, int, int, int]] = {}  # key, offset, bytes, height, width
        self.labels: dict[str, str] = {}  # by key
        self.left_out: list[tuple[str, str]] = []


def scan_shard(path: str) -> Shard:
    """Scans one shard, a file or an object; what is whole in a damaged one counts."""
    found, stamp = _Found(), (-1, -1)
    try:
        file, stamp = _open(path)
        with file:
            start = file.read(tarfile.BLOCKSIZE)
            if start.startswith(_PACKED):
                raise OSError("compressed; unpack it with gunzip, xz or zstd, to read members alone")
            file.seek(0)
            if damage := _walk(_Limited(file), stamp[0], found):
                found.left_out.append(("", damage))
    except GONE:
        raise
    except OSError as error:
        found.left_out.append(("", reason(error)))
    rows = [(name, found.labels.get(key, ""), *row) for name, (key, *row) in found.images.items()]
    return shard_of(stamp, rows, found.left_out)


def shard_of(stamp: tuple[int, int], rows: Sequence[Any], left_out: list[tuple[str, str]]) -> Shard:
    """A shard of rows (name, label, two numbers that say the place, height, width)."""
    names, labels = (np.array([os.fsencode(row[i]) for row in rows], np.bytes_) for i in (0, 1))
    return Shard(stamp, names, labels, np.array([r[2:] for r in rows], np.int64).reshape(-1, 4), left_out)


def _open(path: str) -> tuple[io.BufferedIOBase, tuple[int, int]]:
    """The shard as a file, and its stamp."""
    if is_remote(path):
        return open_object(path)
    local = os.fdopen(open_stamped(path), "rb")
    status = os.fstat(local.fileno())
    return local, (status.st_size, status.st_mtime_ns)


class _Limited:
    """A shard as tarfile reads it, without the memory that a made-up header may ask for."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST:
            raise tarfile.ReadError("a header of absurd length")
        return self.file.read(size)


def _walk(file: _Limited, size: int, found: _Found) -> str:
    """Adds all members, up to the end or to the first damage; what is wrong, or ""."""
    last, tar = -1, None
    try:
        tar = tarfile.open(fileobj=cast(IO[bytes], file), mode="r:")  # noqa: SIM115, for `file` is closed by the caller
        some = tar.firstmember is not None  # type: ignore[attr-defined]  # if not, Python 3.10 seeks before it
        while some and (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # millions of them would take gigabytes
            if member.offset <= last:
                raise tarfile.ReadError("a header that leads back")
            last = member.offset
            _add(file.file, member, size, found)
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end")
    except GONE:
        raise
    except Exception:  # tarfile's own, and whatever else it stumbles over in a damaged header
        cut = "" if tar is None else f"damaged or truncated at byte {tar.offset}; the part before is used"
        return cut or "no tar"
    if file.read(max(0, min(size - file.tell(), _MOST))).strip(b"\0"):
        return f"ends at byte {tar.offset}; what follows, as a tar that was appended, is not read"
    return ""


def _add(file: io.BufferedIOBase, member: tarfile.TarInfo, size: int, found: _Found) -> None:
    name = os.path.normpath(member.name)
    folder, base = os.path.split(name)
    key, ending = os.path.join(folder, base.partition(".")[0]), os.path.splitext(name)[1].lower()
    refused = _refusal(member, name, size)
    content = window(file, member.offset_data, member.size)
    if member.isdir():
        return
    if not refused and ending in EXTENSIONS:
        height, width, refused = inspect(content, member.size)
        if name in found.images:
            refused = "occurs twice in its shard; the first one counts"
        elif not refused:
            found.images[name] = key, member.offset_data, member.size, height, width
    elif not refused and ending in (".cls", ".json"):
        if member.size > _MOST:
            refused = f"longer than the {_MOST} bytes of a label file that are read"
        elif (word := _label(content.read(), ending)) and (ending == ".cls" or key not in found.labels):
            found.labels[key] = word
    if refused:
        found.left_out.append(("".join(one if one.isprintable() else "?" for one in name), refused))


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
        return "truncated with its shard"
    return ""


def _label(content: bytes, ending: str) -> str:
    """The label in a .cls or .json file, or ""."""
    try:
        if ending == ".cls":
            return content.decode().strip()
        facts: Any = json.loads(content)
        return next((str(facts[key]) for key in _LABEL_KEYS if type(facts.get(key)) is int), "")
    except (AttributeError, RecursionError, ValueError):
        return ""


def merge(root: str, shards: list[str], found: list[Shard], kind: str = "shards") -> Scan:
    """The scan of all shards, in their order; a ValueError, which calls them `kind`, without usable image."""
    left_out = [
        LeftOut(os.path.join(name, member) if member else name, why)
        for name, shard in zip(shards, found, strict=True)
        for member, why in shard.left_out
    ]
    numbers = np.concatenate([shard.numbers for shard in found])
    if not len(numbers):
        first = "; ".join(f"{path}: {why}" for path, why in left_out[:3]) or "they are empty"
        raise ValueError(
            f"The {len(shards)} {kind} below {root!r} hold no usable image ({first}); check them."
        )
    words, word = np.unique(np.concatenate([shard.labels for shard in found]), return_inverse=True)
    labels, classes = number_labels([os.fsdecode(one) or None for one in words.tolist()])
    starts = [os.fsencode(os.path.join(name, "")) for name in shards]
    names = [np.char.add(start, shard.names) for start, shard in zip(starts, found, strict=True)]
    place = np.repeat(np.arange(len(shards)), [len(shard.names) for shard in found])
    return Scan(
        root=root,
        paths=pack_names(np.concatenate(names)),
        sizes=numbers[:, 2:].astype(np.int32),
        labels=np.array(labels, np.int32)[word],
        classes=classes,
        left_out=left_out,
        holder="ranges",
        files=shards,
        file_stamps=np.array([shard.stamp for shard in found], np.int64),
        places=np.column_stack([place, numbers[:, :2]]),
    )
