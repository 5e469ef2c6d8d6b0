"""Names and labels of images: class folders and text lists. No image is opened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..system.files import PathLike
from .names import LeftOut
from .remote import absolute, as_url, below, bucket_of, content, is_remote

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
_ENDINGS = tuple(ending.encode() for ending in EXTENSIONS)
_MAX_LABEL = 1 << 20


@dataclass
class Listing:
    """Files to be scanned, in the order of the index."""

    root: str
    names: list[bytes]
    labels: list[int]
    classes: list[str]
    left_out: list[LeftOut] = field(default_factory=list)
    folders: dict[bytes, int] = field(default_factory=dict)
    """mtime_ns of every folder that was read; adding, removing or renaming a file changes it."""
    entries: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    """Bytes and version of the objects of a store."""


def folder_of(path: PathLike) -> str:
    """Absolute path of an existing folder, or URL."""
    if is_remote(path):
        return as_url(path)  # a store has no folders; its listing will show
    root = os.path.abspath(os.fspath(path))
    if not os.path.isdir(root):
        raise FileNotFoundError(f"The image folder {root!r} does not exist or is no folder; check the path.")
    return root


def by_part(name: bytes) -> bytes:
    """Sorting key that compares paths folder by folder, so that a class stays in one piece."""
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
        listing.classes = sorted(name for name, names in found.items() if names)
    else:
        listing.classes = list(classes)
        if absent := sorted(set(classes) - found.keys()):
            raise ValueError(
                f"{root!r} has no folder for the classes {absent[:5]}; correct the list of classes."
            )
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
    """(names of images at the top, names of those in each folder there) below a URL."""
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
    """All image names below a folder; links are followed, but never to a folder that was read already.

    So a few folders full of links to each other end, which have more paths than can be walked.
    """
    images: list[bytes] = []
    seen = {os.path.realpath(root)}
    waiting = [folder]
    for name in waiting:
        place = os.path.realpath(os.path.join(root, name))
        if place not in seen:
            seen.add(place)
            found, folders = _read(root, name, listing)
            images += found
            waiting += sorted(folders)
    return images


def list_file(path: PathLike, root: PathLike | None = None) -> Listing:
    """Lists the files that a text file names, one per line; see `SampleIndex.from_list`."""
    file = absolute(path)
    text = os.fsdecode(read_list(file, "list"))
    text = text.removeprefix("\ufeff")  # some editors mark UTF-8 by it
    lines = [line.strip() for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#")]
    listing = Listing(folder_of(_start(file, lines) if root is None else root), [], [], [])
    words: list[str | None] = []
    seen: set[str] = set()
    for line in lines:
        name, word = _split(line, listing.root)
        if take(name, listing, seen):
            words.append(word)
    if not listing.names:
        raise ValueError(
            f"The list {file!r} names no file below {listing.root!r}; check its lines and the root."
        )
    listing.labels, listing.classes = number_labels(words)
    return listing


def read_list(file: PathLike, what: str) -> bytes:
    """Content of a file or an object that lists images."""
    if is_remote(file) or os.path.isfile(file):
        with suppress(FileNotFoundError):
            return content(file)
    raise FileNotFoundError(f"The {what} {os.fspath(file)!r} does not exist or is no file; check the path.")


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
    reason = ""
    if "\0" in name:
        reason = "has a NUL in its name"
    elif ".." in inside.split("/"):
        reason = f"not below the root {listing.root}"
    elif inside in seen:
        reason = "listed twice; the first time counts"
    if reason:
        listing.left_out.append(LeftOut(name if is_remote(name) else os.path.normpath(name), reason))
        return False
    seen.add(inside)
    listing.names.append(os.fsencode(inside))
    return True


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
        raise ValueError(
            f"Labels must lie between -1 (unknown) and {_MAX_LABEL - 1}; number the classes from 0."
        )
    return labels, [str(i) for i in range(max(labels) + 1)]


def check_labels(
    labels: ArrayLike | None, count: int, classes: Sequence[str] | None
) -> tuple[NDArray[np.int32], list[str]]:
    """The given labels of `count` images and their classes; see `SampleIndex.from_arrays`."""
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
