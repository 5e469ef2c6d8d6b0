"""Scan: which images a data set holds, where each lies, how large it is; and the file that keeps this."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass, field, fields
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..system.files import Arrays, PathLike, load_arrays, pack_names, save_arrays, unpack_names
from ..system.machine import cache_folder
from .formats import MAX_PIXELS
from .headers import Record
from .remote import is_remote, object_stamps

Holder: TypeAlias = Literal["", "ranges", "groups", "objects"]
"""What holds the images, and so the meaning of their `places` (N, 3):

- "": local files of their own, arrays, or a source of one's own; there are no places;
- "ranges": pieces of files or objects, as of tar shards: file, offset, bytes;
- "groups": values of a column in Parquet files: file, group in it, row in that;
- "objects": whole objects in a store: 0, version, bytes.
"""

FORMAT = 3
"""Raised whenever the stored arrays or the rules of the scan change; older files are scanned again."""

CHECKED_FILES = 20_000
"""At most this many files are compared by size and mtime before a kept scan is used."""

_ROWS = 1 << 16  # that are checked at a time

# Type and shape of every array in a file. A letter stands for the same number everywhere: N images, M boxes,
# S files that hold many images, K files that the scan refused, F folders.
_ARRAYS = {
    "paths": "uint8 N L",
    "arrays": "uint8 N H W 3",
    "sizes": "int32 N 2",
    "labels": "int32 N",
    "places": "int64 N 3",
    "file_stamps": "int64 S 2",
    "box_start": "int64 N+1",
    "boxes": "float32 M 4",
    "box_labels": "int32 M",
    "stamp_files": "int64 N 2",
    "stamp_left": "int64 K 2",
    "stamp_folders": "uint8 F P",
    "stamp_times": "int64 F",
}
# What an index with this holder has beside the images.
_PLACED = {
    "": set[str](),
    "ranges": {"places", "file_stamps"},
    "groups": {"places", "file_stamps", "column"},
    "objects": {"places"},
}

T = TypeVar("T", bound="Scan")
Cache: TypeAlias = "bool | PathLike"


class Options(TypedDict, total=False):
    """Options of a scan; see `SampleIndex`. Without `processes`, sets below 1 GB are scanned by threads."""

    cache: Cache
    processes: int | None
    progress: bool


class LeftOut(NamedTuple):
    """A file that was listed but is not in the index."""

    path: str  # relative to the root of the index
    reason: str


def may_be_name(name: bytes) -> bool:
    """Whether an image may have this name: a path below the root, printable, so that it fits a line."""
    try:
        printable = name.decode().isprintable() and name[:1] not in (b"", b"/")
    except UnicodeDecodeError:
        return False
    return printable and b".." not in name.split(b"/")


@dataclass(frozen=True, eq=False)
class Scan:
    """N usable images, in a fixed order. The one record of scans, of their cache and of `SampleIndex`."""

    root: str
    """Absolute folder or URL ("s3://bucket/train"); "" for arrays and a source of one's own."""
    paths: NDArray[np.uint8] | None
    """(N, L) path of each file relative to the root, UTF-8, NUL-padded; None for arrays. In a shard,
    shard.tar/member.jpg; in a source of one's own, the name of the image."""
    sizes: NDArray[np.int32]
    """(N, 2) stored height and width in pixels; EXIF rotation is not applied."""
    labels: NDArray[np.int32]
    """(N,) class of each image, -1 unknown."""
    classes: list[str] = field(default_factory=list)
    """Name of each class; a label is a position in this list."""
    left_out: list[LeftOut] = field(default_factory=list)
    """Path and reason of each file that was listed and cannot be used."""
    holder: Holder = ""
    files: list[str] = field(default_factory=list)
    """S files that hold many images each (tar shards, tables), relative to the root."""
    file_stamps: NDArray[np.int64] | None = None
    """(S, 2) bytes and mtime_ns (or version) of each of these files at the scan, (-1, -1) if absent."""
    places: NDArray[np.int64] | None = None
    """(N, 3) where each image lies; see `Holder`."""
    column: str = ""
    """Column of a table that holds the images."""

    def holds(self) -> bool:
        """Whether all files that were scanned still look the same."""
        assert self.file_stamps is not None
        if is_remote(self.root):
            stamps = object_stamps(self.root, self.files)
        else:
            stamps = [stamp_of(os.path.join(self.root, name)) for name in self.files]
        return stamps == [tuple(stamp) for stamp in self.file_stamps.tolist()]


@dataclass(frozen=True, eq=False, kw_only=True)
class FileScan(Scan):
    """The scan of a listing: images that are files or objects of their own, and what these looked like.

    A stamp is (bytes, mtime_ns) of a file, (bytes, version) of an object, (-1, -1) where there is none.
    """

    stamp_files: NDArray[np.int64]  # (N, 2) of the images
    stamp_left: NDArray[np.int64]  # (K, 2) of the files that were refused, the first K of `left_out`
    stamp_folders: NDArray[np.uint8]  # (F, L) folders that were read, relative to the root, NUL-padded
    stamp_times: NDArray[np.int64]  # (F,) their mtime_ns, which a file that comes or goes changes

    def records(self) -> dict[bytes, Record]:
        """The record of each file that was scanned, by name."""
        assert self.paths is not None
        rows = zip(unpack_names(self.paths), self.sizes.tolist(), self.stamp_files.tolist(), strict=True)
        known: dict[bytes, Record] = {name: (*size, *stamp, "") for name, size, stamp in rows}
        refused = zip(self.left_out, self.stamp_left.tolist(), strict=False)
        return known | {os.fsencode(f.path): (0, 0, *stamp, f.reason) for f, stamp in refused}

    def holds(self) -> bool:
        """Whether folders and files still look the same; of more than `CHECKED_FILES`, an even sample."""
        assert self.paths is not None
        base = os.path.join(os.fsencode(self.root), b"")
        folders = zip(unpack_names(self.stamp_folders), self.stamp_times.tolist(), strict=True)
        if any(stamp_of(base + name)[1] != time for name, time in folders):
            return False
        count = len(self.paths)
        rows = np.unique(np.linspace(0, count - 1, min(count, CHECKED_FILES)).astype(np.int64))
        names = unpack_names(self.paths[rows]) + [os.fsencode(f.path) for f in self.left_out]
        stamps = self.stamp_files[rows].tolist() + self.stamp_left[:CHECKED_FILES].tolist()
        # Files that the listing itself refused have no stamp: the reason does not lie in the file.
        return all(stamp_of(base + n) == tuple(stamp) for n, stamp in zip(names, stamps, strict=False))


def stamp_of(path: bytes | str) -> tuple[int, int]:
    """(bytes, mtime_ns) of a file, (-1, -1) where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a NUL in a name that someone else put into the file
        return -1, -1
    return status.st_size, status.st_mtime_ns


def write_index(path: PathLike, scan: Scan) -> None:
    """Writes a scan or an index in one step; several processes may write the same file."""
    values = {name: getattr(scan, name) for name in _stored(scan)}
    if not len(values.get("boxes", [0])):
        del values["box_start"]  # of N + 1 zeros
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    facts = {name: value for name, value in values.items() if name not in arrays and value is not None}
    save_arrays(path, arrays, {"format": FORMAT, **facts})


def read_index(path: PathLike, kind: type[T]) -> T:
    """Makes a `kind` of the fields that it has and the file stores; errors as of `load_arrays`."""
    with load_arrays(path, "index") as (arrays, facts):
        _require(facts.get("format") == FORMAT, f"format {facts.get('format')}, this version reads {FORMAT}")
        _check(arrays, facts)
        left_out = [LeftOut(*pair) for pair in facts["left_out"]]
        stored = {"paths": None, **facts, **arrays, "left_out": left_out}
        found = {name: stored[name] for name in _stored(kind) if name in stored}
        signature(kind).bind(**found)  # a TypeError for what is not there
    return kind(**found)


def _stored(kind: Any) -> list[str]:
    return [one.name for one in fields(kind) if one.metadata.get("stored", True)]


def _check(arrays: Arrays, facts: dict[str, Any]) -> None:
    """A file that is whole but wrong would end a run hours later, exhaust the memory or leave its root."""
    root, classes, files = facts["root"], facts["classes"], facts.get("files", [])
    holder, column, lists = facts.get("holder", ""), facts.get("column", ""), (classes, files)
    _require(all(isinstance(one, list) for one in lists), "classes or files are not a list")
    # A TypeError for what is no text, a UnicodeError for what cannot be in a file name.
    os.fsencode("".join([root, column, *classes, *files, *chain.from_iterable(facts["left_out"])]))
    absolute = os.path.isabs(root or "/") or (is_remote(root) and holder != "")
    _require(absolute and "\0" not in root, f"root {root!r} is not an absolute path")
    counts = {"N+1": len(arrays["sizes"]) + 1, "S": len(files), "2": 2, "3": 3, "4": 4}
    for name, array in arrays.items():
        kind, *sides = _ARRAYS[name].split()
        fits: Any = array.dtype == kind and array.ndim == len(sides)
        fits = fits and all(
            counts.setdefault(*pair) == pair[1] for pair in zip(sides, array.shape, strict=True)
        )
        _require(fits, f"{name} is {array.dtype} of shape {array.shape}, which does not fit the rest")
    _require(counts["N"] and ("paths" in arrays) != ("arrays" in arrays), "it has no images")
    placed = ({"places", "file_stamps"} & arrays.keys()) | ({"column"} if column else set())
    _require(_PLACED.get(holder) == placed, "it has a part of what an index of containers has")
    for start in range(0, counts["N"], _ROWS):  # so that the check takes no memory of their number
        names = arrays.keys() & {"sizes", "labels", "paths", "places"}
        _check_rows({name: arrays[name][start : start + _ROWS] for name in names}, arrays, facts)
    if files:
        _check_names(pack_names([os.fsencode(name) for name in files]))
    if "box_start" in arrays or counts.get("M"):
        boxes, bounds, labels = arrays["boxes"], arrays["box_start"], arrays["box_labels"]
        fits = bounds[0] == 0 and bounds[-1] == len(boxes) and (np.diff(bounds) >= 0).all()
        _require(fits, "box_start does not divide the boxes")
        inside = ((boxes >= 0) & (boxes <= 1)).all() and (boxes[:, :2] <= boxes[:, 2:]).all()
        _require(inside, "boxes are not rectangles in their images")
        _require((labels >= -1).all() and (labels < len(classes)).all(), "box_labels have no class")


def _check_rows(part: Arrays, arrays: Arrays, facts: dict[str, Any]) -> None:
    sizes, labels = part["sizes"], part["labels"]
    fits = (sizes >= 1).all() and (np.prod(sizes, axis=1, dtype=np.int64) <= MAX_PIXELS).all()
    fits = fits and ("arrays" not in arrays or (sizes == arrays["arrays"].shape[1:3]).all())
    _require(fits, "sizes are not valid")
    _require((labels >= -1).all() and (labels < len(facts["classes"])).all(), "labels have no class")
    if "paths" in part:
        _check_names(part["paths"])
    if "places" in part:
        (file, offset, size), stamps = part["places"].T, arrays.get("file_stamps")
        inside = (part["places"] >= 0).all() and (stamps is None or (file < len(stamps)).all())
        if inside and stamps is not None and facts["holder"] == "ranges":
            inside = (size >= 1).all() and (offset <= stamps[file, 0] - size).all()
        _require(inside, "an image lies in no file")


def _check_names(paths: NDArray[np.uint8]) -> None:
    """Names below the root, each padded with NULs at its end."""
    filled, longest = paths.ravel() != 0, paths.shape[1]
    after_nul = 1 + np.flatnonzero(filled[1:] > filled[:-1])
    whole = filled[::longest].all() and not (after_nul % longest).any()
    _require(whole, "a path is empty or has a NUL inside")
    # Few data sets have two dots anywhere; only then are many names worth splitting.
    climbs = b".." in paths.tobytes() and any(b".." in name.split(b"/") for name in unpack_names(paths))
    _require(not climbs and (paths[:, 0] != ord("/")).all(), "a path leaves the root")


def _require(fits: object, words: str) -> None:
    if not fits:
        raise ValueError(words)


class ScanCache(Generic[T]):
    """The place of one kept scan; see `SampleIndex` for `cache`."""

    def __init__(self, root: str, key: object, kind: type[T], options: Options) -> None:
        """Looks up the `kind` of scan of a root. `key` (JSON-able): what else determined the listing."""
        self.file: Path | None = None
        self.kept: T | None = None
        if unknown := options.keys() - Options.__annotations__.keys():
            known = ", ".join(Options.__annotations__)
            raise TypeError(f"A scan has no option {', '.join(sorted(unknown))}; its options are {known}.")
        cache = options.get("cache", True)
        if cache is False:
            return
        folder = cache_folder() if cache is True else Path(cache)
        digest = hashlib.sha256(json.dumps([root, key]).encode()).hexdigest()[:16]
        name = "".join(c if c.isascii() and c.isalnum() else "_" for c in os.path.basename(root))[:40]
        self.file = folder / f"{name or 'root'}-{digest}.safetensors"
        try:
            kept = read_index(self.file, kind)
        except (OSError, ValueError):
            return  # absent, damaged or wrong: the scan is done again
        self.kept = kept if kept.root == root else None

    def keep(self, scanned: T) -> T:
        """Writes the scan and returns it; a place that cannot be written costs a warning."""
        try:
            if self.file is not None:
                write_index(self.file, scanned)
        except OSError as error:
            words = f"The index is not kept: {str(self.file)!r} cannot be written ({error})."
            warnings.warn(words, stacklevel=5)
        return scanned
