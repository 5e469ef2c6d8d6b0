"""Scan of objects in a store: what they are now, and which are usable images, by many requests at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from .headers import Record, inspect, scan_bar
from .remote import Entry, bucket_of, keys_below
from .remote_file import HEADER, RemoteFile
from .source import GONE, reason

_THREADS = 32
_SINGLY = 1000
"""Up to so many objects are asked for one by one; of more, the folder above them is listed."""

_CHUNK = 64  # objects that a thread looks at in turn, at most

_ABSENT = (-1, -1)


def object_stamps(root: str, names: Sequence[str]) -> list[tuple[int, int]]:
    """(bytes, version) of the objects below a URL, (-1, -1) of those that are not there.

    Raises:
        SourceGoneError: See `remote.Bucket`.
    """
    bucket, keys = keys_below(root, names)
    # A web server cannot list what it has.
    if len(names) > _SINGLY and not root.startswith("http"):
        there = {entry.name: (entry.size, entry.version) for entry in bucket.entries(bucket_of(root)[1])}
        return [there.get(name, _ABSENT) for name in names]

    def look(key: str) -> tuple[int, int]:
        try:
            entry = bucket.stat(key)
        except GONE:
            raise
        except OSError:
            return _ABSENT
        return entry.size, entry.version

    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(look, keys))


def scan_objects(
    root: str,
    names: Sequence[bytes],
    stamps: Mapping[bytes, tuple[int, int]],
    known: Mapping[bytes, Record],
    progress: bool,
) -> list[Record]:
    """Looks at objects; a record has the version of an object in the place of a file's mtime.

    Args:
        root: URL that the names are relative to.
        names: Objects to look at.
        stamps: Bytes and version of all of them, as a listing has told; if empty, the store is asked.
        known: Records of an earlier scan by name; objects of equal size and version are not read again.
        progress: Shows a bar on a terminal.

    Raises:
        SourceGoneError: See `remote.Bucket`.
    """
    if not stamps:
        stamps = dict(zip(names, object_stamps(root, [os.fsdecode(name) for name in names]), strict=True))

    def look(name: bytes) -> Record:
        stamp, before = stamps[name], known.get(name)
        if before is not None and before[2:4] == stamp and stamp[1]:
            return before
        if stamp == _ABSENT:
            return 0, 0, *_ABSENT, "no such object"
        url = os.path.join(root, os.fsdecode(name))
        height, width, told = _inspected(url, Entry(url, *stamp))
        return height, width, *stamp, told

    each = max(1, min(_CHUNK, len(names) // (4 * _THREADS)))
    chunks = [names[start : start + each] for start in range(0, len(names), each)]
    records: list[Record] = []
    with ThreadPoolExecutor(_THREADS) as threads, scan_bar(len(names), " objects", progress) as bar:
        for part in threads.map(lambda chunk: [look(name) for name in chunk], chunks):
            records += part
            bar.update(len(part))
    return records


def _inspected(url: str, entry: Entry) -> tuple[int, int, str]:
    try:
        return inspect(io.BufferedReader(RemoteFile(url, HEADER, entry), HEADER), entry.size)
    except GONE:
        raise
    except OSError as error:
        return 0, 0, reason(error)
