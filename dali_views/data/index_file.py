"""How an index is stored: one .npz of its arrays, uncompressed, with all else as JSON in the array `meta`.

What is read is held against itself first, so that a file which is whole but wrong is refused here and not by
an IndexError hours later.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..system.archive import open_npz
from ..system.files import PathLike, atomic_write
from .headers import MAX_PIXELS
from .listing import LeftOut
from .remote import is_remote
from .store import PLACED

FORMAT = 2
"""Raised whenever the stored arrays or the rules of the scan change; older files are scanned anew."""

_CHECKED = 1 << 16  # rows that are checked at a time

T = TypeVar("T")

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
        for field in fields(make):
            told_of = field.name in facts or field.name in arrays or field.name == "paths"
            if not told_of and field.default is MISSING and field.default_factory is MISSING:
                raise ValueError(f"it has no {field.name}")
    index: T = make(**{"paths": None, **facts, **arrays, "left_out": left_out})
    return index


def _stored(index: Any) -> list[str]:
    """The fields of a dataclass or of one's instance, less those that are marked as not stored."""
    return [field.name for field in fields(index) if field.metadata.get("stored", True)]


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


def may_be_name(name: bytes) -> bool:
    """Whether an image may be named so: as a path below the root, and in one line of a list."""
    try:
        whole = name.decode().isprintable() and name[:1] not in (b"", b"/")
    except UnicodeDecodeError:
        return False
    return whole and b".." not in name.split(b"/")


def pack_names(names: Sequence[bytes]) -> NDArray[np.uint8]:
    """(N, L) names as bytes, padded with NULs to the longest."""
    return np.array(names, dtype=np.bytes_).view(np.uint8).reshape(len(names), -1)


def unpack_names(paths: NDArray[np.uint8]) -> list[bytes]:
    """What `pack_names` packed."""
    names: list[bytes] = np.ascontiguousarray(paths).view(f"S{paths.shape[1]}").ravel().tolist()
    return names
