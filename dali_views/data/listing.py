"""Image folders and text lists: which images they name, with which labels, and what their headers say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Unpack

from ..system.files import PathLike, pack_names
from .headers import Record, cores, inspect, inspect_file, look_through, require_some
from .remote import (
    absolute,
    as_url,
    below,
    bucket_of,
    content,
    is_remote,
    object_stamps,
    open_object,
)
from .scan import FileScan, LeftOut, Options, ScanCache

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
_ENDINGS = tuple(ending.encode() for ending in EXTENSIONS)
_MAX_LABEL = 1 << 20
_FILES, _BYTES = 256, 50_000  # files that a thread scans in turn, and what one is supposed to have
_OBJECTS, _THREADS, _HEADER = 16, 32, 32 << 10  # objects in turn, threads, bytes of a request for a header


@dataclass
class Listing:
    """Files to be scanned, in the order of the index."""

    root: str
    names: list[bytes]
    labels: list[int]
    classes: list[str]
    left_out: list[LeftOut] = field(default_factory=list)
    folders: dict[bytes, int] = field(default_factory=dict)  # mtime_ns of those that were read
    entries: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # bytes and version of objects


def scan_folder(root: PathLike, classes: Sequence[str] | None, **options: Unpack[Options]) -> FileScan:
    """An image folder; if nothing in it has changed, it is not even listed."""
    base = absolute(root)
    key = ["folder", None if classes is None else list(classes)]
    place = ScanCache(base, key, FileScan, options)
    if place.kept is not None and not is_remote(base) and place.kept.holds():
        return place.kept
    return scan_listing(list_folder(base, classes), place, options)


def scan_listing(listing: Listing, place: ScanCache[FileScan], options: Options) -> FileScan:
    """Scans the listed files, separates good from bad and keeps the result."""
    known = {} if place.kept is None else place.kept.records()
    progress = options.get("progress", True)
    if remote := is_remote(listing.root):
        records = _scan_objects(listing, known, progress)
    else:
        root = os.path.join(os.fsencode(listing.root), b"")
        jobs = [(root + name, known.get(name)) for name in listing.names]
        size, threads, workers = _BYTES * len(jobs), min(8, 2 * cores()), options.get("processes")
        records = look_through(inspect_file, jobs, size, workers, "files", progress, threads, _FILES)
    good = [i for i, record in enumerate(records) if not record[4]]
    bad = [i for i, record in enumerate(records) if record[4]]
    left_out = [LeftOut(os.fsdecode(listing.names[i]), records[i][4]) for i in bad] + listing.left_out
    require_some(good, left_out, f"files below {listing.root!r}")
    table = np.array([records[i][:4] for i in good], np.int64)
    scanned = FileScan(
        root=listing.root,
        paths=pack_names([listing.names[i] for i in good]),
        sizes=table[:, :2].astype(np.int32),
        labels=np.array([listing.labels[i] for i in good], np.int32),
        classes=listing.classes,
        left_out=left_out,
        stamp_files=table[:, 2:],
        stamp_left=np.array([records[i][2:4] for i in bad], np.int64).reshape(-1, 2),
        stamp_folders=pack_names(list(listing.folders)),
        stamp_times=np.array(list(listing.folders.values()), np.int64),
        holder="objects" if remote else "",
        places=np.column_stack([np.zeros(len(good), np.int64), table[:, [3, 2]]]) if remote else None,
    )
    return place.keep(scanned)


def _scan_objects(listing: Listing, known: dict[bytes, Record], progress: bool) -> list[Record]:
    """Looks at objects, unless size and version are known; a version stands in the place of an mtime."""
    stamps = listing.entries
    if not stamps:
        found = object_stamps(listing.root, [os.fsdecode(name) for name in listing.names])
        stamps = dict(zip(listing.names, found, strict=True))

    def look(name: bytes) -> Record:
        stamp, before = stamps[name], known.get(name)
        if before is not None and before[2:4] == stamp and stamp[1]:
            return before
        if stamp[0] < 0:
            return 0, 0, *stamp, "no such object"
        url = os.path.join(listing.root, os.fsdecode(name))
        height, width, refused = inspect(open_object(url, stamp, _HEADER)[0], stamp[0])
        return height, width, *stamp, refused

    return look_through(look, listing.names, 0, 0, "objects", progress, _THREADS, _OBJECTS)


def folder_of(path: PathLike) -> str:
    if is_remote(path):
        return as_url(path)  # a store has no folders; its listing will show
    root = os.path.abspath(os.fspath(path))
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f"The image folder {root!r} does not exist or is not a folder; check the path."
        )
    return root


def by_part(name: bytes) -> bytes:
    """Sorting key of paths, folder by folder, so that a class stays in one piece."""
    return name.replace(b"/", b"\0")


def list_folder(path: PathLike, classes: Sequence[str] | None = None) -> Listing:
    """Lists an image folder: `root/<class>/**/image`, or a flat one without labels."""
    root = folder_of(path)
    listing = Listing(root, [], [], [])
    if is_remote(root):
        top, held = _objects(listing)
    else:
        top, folders = _read(os.fsencode(root), b"", listing)
        if classes is not None:  # the others need not be read
            folders = [name for name in folders if os.fsdecode(name) in classes]
        held = {folder: _walk(os.fsencode(root), folder, listing) for folder in folders}
    found = {os.fsdecode(folder): names for folder, names in held.items()}
    if classes is None:
        classes = sorted(name for name, names in found.items() if names)
    listing.classes = list(classes)
    if absent := sorted(set(classes) - found.keys()):
        raise ValueError(f"{root!r} has no folder for the classes {absent[:5]}; correct the list of them.")
    if len(set(classes)) < len(classes):
        raise ValueError("The list of classes names one class twice; remove the repetition.")
    if listing.classes:
        listing.left_out += [LeftOut(os.fsdecode(n), "lies beside the class folders") for n in top]
        pairs = [(name, label) for label, kind in enumerate(listing.classes) for name in found[kind]]
    else:
        pairs = [(name, -1) for name in top]
    if not pairs:
        raise ValueError(
            f"The folder {root!r} holds no image ({', '.join(EXTENSIONS)}); check the path. Name tar shards "
            f"and tables in it themselves, as '{root}/*.tar'."
        )
    pairs.sort(key=lambda pair: by_part(pair[0]))
    listing.names, listing.labels = [n for n, _ in pairs], [k for _, k in pairs]
    return listing


def _objects(listing: Listing) -> tuple[list[bytes], dict[bytes, list[bytes]]]:
    """Names of images at the top below a URL, and names of those in each folder there."""
    bucket, prefix = bucket_of(listing.root)
    top: list[bytes] = []
    folders: dict[bytes, list[bytes]] = {}
    for entry in bucket.entries(prefix):
        name = os.fsencode(entry.name)
        folder, slash, _ = name.rpartition(b"/")
        if not name.lower().endswith(_ENDINGS) or b"/." in b"/" + folder:
            continue
        listing.entries[name] = entry.size, entry.version
        (folders.setdefault(name.partition(b"/")[0], []) if slash else top).append(name)
    return top, folders


def _read(root: bytes, folder: bytes, listing: Listing) -> tuple[list[bytes], list[bytes]]:
    """(image names, sub-folders) of one folder, relative to the root; hidden sub-folders are passed over."""
    full = os.path.join(root, folder)
    images, folders = [], []
    try:
        listing.folders[folder] = os.stat(full).st_mtime_ns
        with os.scandir(full) as entries:
            for entry in entries:
                name = os.path.join(folder, entry.name)
                # An entry that links to itself would raise, and cost the rest of the folder.
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    if not entry.name.startswith(b"."):
                        folders.append(name)
                elif entry.name.lower().endswith(_ENDINGS):
                    images.append(name)
    except OSError as error:
        listing.left_out.append(LeftOut(os.fsdecode(folder), f"folder cannot be read ({error.strerror})"))
    return images, folders


def _walk(root: bytes, folder: bytes, listing: Listing) -> list[bytes]:
    """All image names below a folder; links are followed, but never to a folder that was read already."""
    images: list[bytes] = []
    seen, waiting = {os.path.realpath(root)}, [folder]
    for name in waiting:
        place = os.path.realpath(os.path.join(root, name))
        if place not in seen:
            seen.add(place)
            found, folders = _read(root, name, listing)
            images += found
            waiting += sorted(folders)
    return images


def scan_list(path: PathLike, root: PathLike | None, **options: Unpack[Options]) -> FileScan:
    """The files that a text file names, one per line; see `SampleIndex.from_list`."""
    file = absolute(path)
    text = os.fsdecode(read_list(file, "list")).removeprefix("\ufeff")  # some editors mark UTF-8 by it
    lines = [line.strip() for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#")]
    listing = Listing(folder_of(_start(file, lines) if root is None else root), [], [], [])
    seen: set[str] = set()
    pairs = [_split(line, listing.root) for line in lines]
    words = [word for name, word in pairs if take(name, listing, seen)]
    if not listing.names:
        raise ValueError(
            f"The list {file!r} names no file below {listing.root!r}; check its lines and the root."
        )
    listing.labels, listing.classes = number_labels(words)
    return scan_listing(listing, ScanCache(listing.root, ["list", file], FileScan, options), options)


def read_list(file: PathLike, what: str) -> bytes:
    """Content of a file or an object that lists images."""
    if is_remote(file) or os.path.isfile(file):
        with suppress(FileNotFoundError):
            return content(file)
    raise FileNotFoundError(
        f"The {what} {os.fspath(file)!r} does not exist or is not a file; check the path."
    )


def _start(file: str, lines: Sequence[str]) -> str:
    """Where the paths of a list start: at its own folder, or at what the URLs in it have in common."""
    urls = [as_url(_split(line, "")[0]) for line in lines if is_remote(line)]
    if not urls or is_remote(file):
        return os.path.dirname(file)
    start = os.path.commonpath([os.path.dirname(url) for url in urls])
    if not is_remote(start):
        raise ValueError(f"The list {file!r} names objects of several buckets; write a list of each.")
    return start


def take(name: str, listing: Listing, seen: set[str]) -> bool:
    """Adds a name to the listing, or leaves it out; a name must not lead out of the root."""
    inside = below(name, listing.root)
    if "\0" in name:
        refused = "has a NUL in its name"
    elif ".." in inside.split("/"):
        refused = f"not below the root {listing.root}"
    elif inside in seen:
        refused = "listed twice; the first time counts"
    else:
        seen.add(inside)
        listing.names.append(os.fsencode(inside))
        return True
    listing.left_out.append(LeftOut(name if is_remote(name) else os.path.normpath(name), refused))
    return False


def _split(line: str, root: str) -> tuple[str, str | None]:
    if "\t" in line:
        name, word = line.rsplit("\t", 1)
        return name.strip(), word.strip()
    parts = line.rsplit(None, 1)
    if len(parts) == 1 or parts[1].lower().endswith(EXTENSIONS) or os.path.exists(os.path.join(root, line)):
        return line, None
    return parts[0], parts[1]


def number_labels(words: Sequence[str | None]) -> tuple[list[int], list[str]]:
    """Labels and classes of the label column: numbers stay as they are, words are numbered in order."""
    try:
        # To Python, 1_2 is 12.
        labels = [-1 if word is None else int(word.replace("_", "no number")) for word in words]
    except ValueError:
        classes = sorted({word for word in words if word is not None})
        place = {name: i for i, name in enumerate(classes)}
        return [-1 if word is None else place[word] for word in words], classes
    if min(labels) < -1 or max(labels) >= _MAX_LABEL:
        raise ValueError(f"Labels must be -1 (unknown) to {_MAX_LABEL - 1}; number the classes from 0.")
    return labels, [str(i) for i in range(max(labels) + 1)]


def check_labels(
    labels: ArrayLike | None, count: int, classes: Sequence[str] | None
) -> tuple[NDArray[np.int32], list[str]]:
    """The labels of `count` images and their classes; see `SampleIndex.from_arrays`."""
    given = np.full(count, -1, np.int32) if labels is None else np.asarray(labels)
    if given.dtype.kind not in "iu":
        raise TypeError(f"labels must be whole numbers, not {given.dtype}; convert them first.")
    if given.shape != (count,):
        raise ValueError(f"labels must have the shape ({count},) of the images, not {given.shape}.")
    given = given.astype(np.int64)  # -1 must be a number of its kind
    top = int(given.max(initial=-1)) + 1
    names = [str(i) for i in range(top)] if classes is None else list(classes)
    if given.min(initial=-1) < -1 or top > len(names):
        raise ValueError(f"labels must lie between -1 and {len(names) - 1}; correct them or classes.")
    return given.astype(np.int32), names
