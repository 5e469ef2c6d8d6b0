"""Scan: which images a data set holds, where each lies, how large it is; and the file that keeps this.

The file is one .npz of the arrays, uncompressed, with all else as JSON in the array `meta`. What is read is
checked first, so that a file which is whole but wrong is refused here and not by an IndexError hours later.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..system.archive import open_npz
from ..system.files import PathLike, atomic_write
from .headers import MAX_PIXELS, Record
from .listing import LeftOut
from .names import pack_names, unpack_names
from .objects import object_stamps
from .remote import is_remote

Holder: TypeAlias = Literal["", "ranges", "groups", "objects"]
"""What holds the images, and so what their `places` (N, 3) say:

- "": local files of their own, arrays, or a source of one's own; there are no places;
- "ranges": pieces of container files, as tar shards are: file, offset, bytes;
- "groups": values of a column in Parquet or compressed Arrow files: file, group in it, row in that;
- "objects": whole objects in a store: 0, version, bytes.

The root of ranges and objects may be a URL.
"""

PLACED: Mapping[str, Mapping[str, bool]] = {
    "": {"files": False, "places": False, "column": False},
    "ranges": {"paths": True, "files": True, "places": True, "column": False},
    "groups": {"paths": True, "files": True, "places": True, "column": True},
    "objects": {"paths": True, "files": False, "places": True, "column": False},
}
"""What is stored for each holder."""

CHECKED_FILES = 20_000
"""At most this many files are compared by size and mtime before a kept scan is used."""

FORMAT = 2
"""Raised whenever the stored arrays or the rules of the scan change; older files are scanned anew."""

_CHECKED = 1 << 16  # rows that are checked at a time

T = TypeVar("T", bound="Scan")

# Type and shape of every array that an index or a kept scan has. A letter stands for the same number
# everywhere: N images, M boxes, S files that hold many images, K files that the scan refused, F folders; None
# for any number.
_ARRAYS: dict[str, tuple[Any, tuple[str | int | None, ...]]] = {
    "paths": (np.uint8, ("N", None)),
    "arrays": (np.uint8, ("N", None, None, 3)),
    "sizes": (np.int32, ("N", 2)),
    "labels": (np.int32, ("N",)),
    "places": (np.int64, ("N", 3)),
    "file_stamps": (np.int64, ("S", 2)),
    "box_start": (np.int64, (None,)),
    "boxes": (np.float32, ("M", 4)),
    "box_labels": (np.int32, ("M",)),
    "stamp_files": (np.int64, ("N", 2)),
    "stamp_left": (np.int64, ("K", 2)),
    "stamp_folders": (np.bytes_, ("F",)),
    "stamp_times": (np.int64, ("F",)),
}


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
    """What holds the images, if they are neither files of their own nor arrays."""
    files: list[str] = field(default_factory=list)
    """Files that hold many images each (tar shards, tables), relative to the root."""
    file_stamps: NDArray[np.int64] | None = None
    """(S, 2) bytes and mtime_ns (or version) of each of these files at the scan, (-1, -1) if absent."""
    places: NDArray[np.int64] | None = None
    """(N, 3) where each image lies; see `Holder`."""
    column: str = ""
    """Column of a table that holds the images."""

    def holds(self) -> bool:
        """Whether all files that were scanned still look the same."""
        assert self.file_stamps is not None
        stamps = [tuple(stamp) for stamp in self.file_stamps.tolist()]
        if is_remote(self.root):
            return object_stamps(self.root, self.files) == stamps
        paths = [os.path.join(self.root, name) for name in self.files]
        return all(stamp_of(path) == stamp for path, stamp in zip(paths, stamps, strict=True))


def _no_stamps() -> NDArray[np.int64]:
    return np.zeros((0, 2), np.int64)


@dataclass(frozen=True, eq=False)
class FileScan(Scan):
    """The scan of a listing: images that are files or objects of their own, and what these looked like.

    A stamp is (bytes, mtime_ns) of a file, (bytes, version) of an object, (-1, -1) where there is none.
    """

    stamp_files: NDArray[np.int64] = field(default_factory=_no_stamps)
    """(N, 2) stamps of the images."""
    stamp_left: NDArray[np.int64] = field(default_factory=_no_stamps)
    """(K, 2) stamps of the files that the scan refused, which are the first K of `left_out`."""
    stamp_folders: NDArray[np.bytes_] = field(default_factory=lambda: np.zeros(0, np.bytes_))
    """(F,) folders that were read, relative to the root."""
    stamp_times: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(F,) their mtime_ns; adding, removing or renaming a file changes it."""

    def records(self) -> dict[bytes, Record]:
        """What the scan said about each file it looked at."""
        assert self.paths is not None
        rows = zip(unpack_names(self.paths), self.sizes.tolist(), self.stamp_files.tolist(), strict=True)
        known: dict[bytes, Record] = {name: (*size, *stamp, "") for name, size, stamp in rows}
        refused = zip(self.left_out, self.stamp_left.tolist(), strict=False)
        return known | {os.fsencode(f.path): (0, 0, *stamp, f.reason) for f, stamp in refused}

    def holds(self) -> bool:
        """Whether folders and files still look the same; of more than `CHECKED_FILES`, an even sample."""
        assert self.paths is not None
        base = os.path.join(os.fsencode(self.root), b"")
        folders = zip(self.stamp_folders.tolist(), self.stamp_times.tolist(), strict=True)
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


def write_index(path: PathLike, index: Any) -> None:
    """Writes the fields of a dataclass of NumPy arrays and JSON-able facts, in one step."""
    values = {name: getattr(index, name) for name in _stored(index)}
    if not len(values.get("boxes", [0])):
        del values["box_start"]  # of N + 1 zeros
    arrays: dict[str, Any] = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    facts = {name: value for name, value in values.items() if name not in arrays and value is not None}
    text = json.dumps({"format": FORMAT, **facts}).encode()
    with atomic_write(path, shared=True) as file:
        np.savez(file, meta=np.frombuffer(text, np.uint8), **arrays)


def read_index(path: PathLike, kind: type[T]) -> T:
    """Makes a `kind` of the fields that it has and the file stores; a `SampleIndex` reads a kept scan, too.

    The arrays of a large file are mapped, not read: processes on one machine share their pages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, something else, of another format version, or contradicts itself.
    """
    make: Any = kind
    known = set(_stored(make))
    with open_npz(path, "index") as stored:
        told: Mapping[str, Any] = json.loads(stored.pop("meta").tobytes())
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']}, this version reads {FORMAT}")
        there = stored.keys() & known
        # In a fixed order, so that of what does not fit together always the same is named.
        arrays = {name: stored[name] for name in [*_ARRAYS, *sorted(known - _ARRAYS.keys())] if name in there}
        facts = {name: told[name] for name in told.keys() & known - _ARRAYS.keys()}
        _check_facts(facts)
        _check_arrays(arrays, len(facts["classes"]), len(facts["left_out"]))
        _check_places(arrays, facts)
        left_out = [LeftOut(*pair) for pair in facts["left_out"]]
        for one in fields(make):
            needed = one.default is MISSING and one.default_factory is MISSING
            if needed and one.name not in {"paths", *facts, *arrays}:
                raise ValueError(f"it has no {one.name}")
    index: T = make(**{"paths": None, **facts, **arrays, "left_out": left_out})
    return index


def _stored(index: Any) -> list[str]:
    """The fields of a dataclass or of one's instance, less those that are marked as not stored."""
    return [one.name for one in fields(index) if one.metadata.get("stored", True)]


def _check_facts(facts: Mapping[str, Any]) -> None:
    root, classes, left_out = (facts[name] for name in ("root", "classes", "left_out"))
    if not isinstance(classes, list) or any(len(pair) != 2 for pair in left_out):
        raise ValueError("classes or left_out are no lists")
    # What is no text cannot be joined, and what could not be part of a file name not be encoded.
    os.fsencode("".join([root, *classes, *(text for pair in left_out for text in pair)]))
    if "\0" in root or not (os.path.isabs(root or "/") or (is_remote(root) and facts.get("holder"))):
        raise ValueError(f"root {root!r} is no absolute path")
    if not isinstance(facts.get("column", ""), str):
        raise ValueError("the column is no text")
    if not re.fullmatch("[0-9a-f]*", facts.get("fingerprint", "")):
        raise ValueError("the fingerprint is no hexadecimal text")


def _check_arrays(arrays: Mapping[str, NDArray[Any]], classes: int, left_out: int) -> None:
    """Types, shapes and ranges, each against the others."""
    counts: dict[str, int] = {}
    for name, array in arrays.items():
        kind, shape = _ARRAYS[name]
        sides = zip(shape, array.shape, strict=True)  # a ValueError for another number of axes
        wrong = any(
            side != (counts.setdefault(want, side) if isinstance(want, str) else want or side)
            for want, side in sides
        )
        if wrong or array.dtype.type is not kind or not array.dtype.isnative:
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, which does not fit the rest")
    sizes, paths, images = arrays["sizes"], arrays.get("paths"), arrays.get("arrays")
    if not len(sizes) or (paths is None) == (images is None):
        raise ValueError("it has no images")
    if paths is not None:
        _check_paths(paths)
    for part in _parts(sizes):
        largest = np.prod(part, axis=1, dtype=np.int64).max()
        if part.min() < 1 or (largest > MAX_PIXELS if images is None else (part != images.shape[1:3]).any()):
            raise ValueError("sizes are no sizes of images")
    _check_boxes(arrays, len(sizes))
    for name in arrays.keys() & {"labels", "box_labels"}:
        if any(part.min() < -1 or part.max() >= classes for part in _parts(arrays[name])):
            raise ValueError(f"{name} have no class")
    if counts.get("K", 0) > left_out:
        raise ValueError("more files have the stamp of a refused one than were refused")


def _check_boxes(arrays: Mapping[str, NDArray[Any]], count: int) -> None:
    boxes = arrays.get("boxes", np.zeros((0, 4), np.float32))
    start = arrays.get("box_start")
    if start is None:
        divided = not len(boxes)
    else:
        divided = len(start) == count + 1 and start[0] == 0 and start[-1] == len(boxes)
        divided = divided and not (start[1:] < start[:-1]).any()
    if not divided:
        raise ValueError("box_start does not divide the boxes among the images")
    if not ((boxes >= 0) & (boxes <= 1)).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError("boxes are no rectangles in their images")
    if len(arrays.get("box_labels", np.zeros(0))) != len(boxes):
        raise ValueError("box_labels are not as many as boxes")


def _check_places(arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
    """What the holder of the images needs is there, and nothing else; it lies below the root."""
    holder, files, stamps = facts.get("holder", ""), facts.get("files", []), arrays.get("file_stamps")
    needed = PLACED.get(holder)
    if needed is None:
        raise ValueError(f"this version knows no holder {holder!r}")
    has = {
        "paths": "paths" in arrays,
        "files": bool(files),
        "places": "places" in arrays,
        "column": bool(facts.get("column")),
    }
    if any(has[what] != wanted for what, wanted in needed.items()) or (stamps is None) == has["files"]:
        raise ValueError("it has a part of what an index of containers has")
    if not isinstance(files, list) or len(files) != (0 if stamps is None else len(stamps)) or not all(files):
        raise ValueError("files are no list of names with a stamp each")
    if files:
        _check_paths(pack_names([os.fsencode(name) for name in files]))
    for part in _parts(arrays.get("places", np.zeros((0, 3), np.int64))):
        if part.min() < 0 or (len(files) and part[:, 0].max() >= len(files)):
            raise ValueError("an image lies in no file")
        if holder == "ranges":
            ends, offset, size = arrays["file_stamps"][part[:, 0], 0], part[:, 1], part[:, 2]
            if size.min() < 1 or (offset > ends - size).any():
                raise ValueError("an image leads out of its file")


def _parts(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The rows, some at a time, so that checking takes no memory of their number."""
    return (array[start : start + _CHECKED] for start in range(0, len(array), _CHECKED))


def _check_paths(paths: NDArray[np.uint8]) -> None:
    """Names below the root, each padded with NULs at its end."""
    for part in _parts(paths):
        filled, longest = part.ravel() != 0, part.shape[1]
        after_nul = 1 + np.flatnonzero(filled[1:] > filled[:-1])
        if not filled[::longest].all() or (after_nul % longest).any():
            raise ValueError("a path is empty or has a NUL inside")
        # Few data sets have two dots anywhere; only then are many names worth parting.
        climbs = b".." in part.tobytes() and any(b".." in name.split(b"/") for name in unpack_names(part))
        if climbs or (part[:, 0] == ord("/")).any():
            raise ValueError("a path leaves the root")


class ScanCache(Generic[T]):
    """The place of one kept scan, and what lies there."""

    def __init__(self, cache: bool | PathLike, root: str, options: object, kind: type[T]) -> None:
        """Looks the scan up.

        Args:
            cache: True means $DALI_VIEWS_CACHE, or dali_views in $XDG_CACHE_HOME, or ~/.cache/dali_views;
                a path means that folder; False means nowhere.
            root: The folder that was scanned.
            options: What else shaped the listing, JSON-able.
            kind: Dataclass of the scan, which has a `root`.
        """
        self.file: Path | None = None
        self.kept: T | None = None
        if cache is False:
            return
        if cache is True:
            own, shared = os.environ.get("DALI_VIEWS_CACHE"), os.environ.get("XDG_CACHE_HOME")
            folder = Path(own) if own else Path(shared or os.path.expanduser("~/.cache")) / "dali_views"
        else:
            folder = Path(cache)
        digest = hashlib.sha256(json.dumps([root, options]).encode()).hexdigest()[:16]
        name = "".join(c if c.isascii() and c.isalnum() else "_" for c in os.path.basename(root))[:40]
        self.file = folder / f"{name or 'root'}-{digest}.npz"
        try:
            kept: Any = read_index(self.file, kind)
        except (OSError, ValueError):
            return  # absent, damaged or wrong: the scan is done anew
        self.kept = kept if kept.root == root else None

    def keep(self, scanned: T) -> None:
        """Writes the scan; a place that cannot be written costs a warning."""
        if self.file is None:
            return
        try:
            write_index(self.file, scanned)
        except OSError as error:
            warnings.warn(
                f"The index is not kept: {str(self.file)!r} cannot be written ({error}).", stacklevel=5
            )
