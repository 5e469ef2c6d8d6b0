"""Images in an object store, whole objects or parts of larger ones: scanned, and read many at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..system.files import PathLike
from .headers import Record, inspect, look_through
from .remote import ABSENT, Entry, bucket_of, keys_below, object_stamps
from .source import Window

_HEADER, _WALK = 32 << 10, 4 << 20  # bytes of a request: for the header of an image, for a whole tar shard
_THREADS = 32
_CHUNK = 16  # objects that a thread looks at in turn


def open_object(
    url: PathLike, entry: Entry | None = None, block: int = _WALK
) -> tuple[io.BufferedReader, Entry]:
    """An object as a file that can be sought in, and its entry; errors, also of reading, as of `Bucket`.

    Args:
        entry: From a listing; without it, the store is asked.
        block: Bytes of one request.
    """
    bucket, key = bucket_of(url)
    known = entry or bucket.stat(key)

    def read_at(buffer: memoryview, at: int) -> int:
        found = bucket.read(key, at, len(buffer), known.version)
        if len(found) < len(buffer):
            raise OSError("it is shorter than it was when it was listed")
        buffer[:] = found
        return len(found)

    return io.BufferedReader(Window(read_at, 0, known.size), block), known


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
        stamps: (bytes, version) of each object from a listing; if empty, the store is asked.
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
        if stamp == ABSENT:
            return 0, 0, *ABSENT, "no such object"
        url = os.path.join(root, os.fsdecode(name))
        height, width, refused = inspect(open_object(url, Entry(url, *stamp), _HEADER)[0], stamp[0])
        return height, width, *stamp, refused

    return look_through(look, names, 0, 0, "objects", progress, _THREADS, _CHUNK)


@dataclass(frozen=True, eq=False)
class ObjectSource:
    """Whole objects, or ranges of objects (tar shards), as a `Source`. They must be as they were scanned."""

    root: str
    """URL that the names start from."""
    names: NDArray[np.uint8] | Sequence[str]
    """(N, L) of the objects themselves, NUL-padded, or of the S objects that hold the images."""
    stamps: NDArray[np.int64] | None
    """(S, 2) bytes and version of each object that holds images; None for whole objects."""
    places: NDArray[np.int64]
    """(N, 3) object, offset and bytes of each image; of whole objects 0, version and bytes."""

    def __len__(self) -> int:
        return len(self.places)

    def read(self, rows: NDArray[np.int64]) -> list[bytes]:
        """See `Source`; FileNotFoundError for an object that is gone, OSError for one that has changed."""
        places = self.places[rows].tolist()
        if self.stamps is None:
            names = [os.fsdecode(self.names[row].tobytes().rstrip(b"\0")) for row in rows.tolist()]
            what = [(0, None, version) for _, version, _ in places]
        else:
            names = [str(self.names[number]) for number, _, _ in places]
            what = [(offset, size, int(self.stamps[number, 1])) for number, offset, size in places]
        bucket, keys = keys_below(self.root, names)
        found = bucket.read_parts([(key, *part) for key, part in zip(keys, what, strict=True)])
        if [len(one) for one in found] != [size for _, _, size in places]:
            raise OSError("its size has changed since it was indexed; index the images again")
        return found
