"""What is kept within a bound: encoded images of a slow source on a local disk, other values in memory.

An image on the disk stays while its set is in use: an epoch reads each image once, so that replacing one by
another gains nothing.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import warnings
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..system.files import PathLike
from .source import Source, read_rows

_ENTRY = struct.Struct("<QII")  # offset in the data, bytes (0: not kept), CRC-32 of row and bytes
_PAGE = 4096  # bytes that the first entry in a part of the sparse table takes
_LEAST = 2  # values in memory that stay whatever their size: threads that read in order use two at a time
_ENDING = ".images"  # of the folder of a set; nothing else is counted or removed
_LOCK, _NAMES = "images.lock", ("images.table", "images.data")  # the last one is locked while in use


class MemoryCache:
    """The values that were used last, at most so many bytes; threads that need the same one wait for it."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.clear()

    def clear(self) -> None:
        """Forgets all; also for a forked child, in whose copy a lock may be held by nobody."""
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock, self._making = threading.Lock(), [threading.Lock() for _ in range(64)]

    def used_bytes(self) -> int:
        return sum(value.nbytes for value in self._values.values())

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value, made now if it is not kept; it has `nbytes`."""
        with self._making[hash(key) % len(self._making)]:
            with self._lock:
                value = self._values.pop(key, None)
            value = make() if value is None else value
            with self._lock:
                self._values[key] = value  # as the last one used
                while len(self._values) > _LEAST and self.used_bytes() > self.most_bytes:
                    self._values.popitem(last=False)
        return value


class CachedSource:
    """A source whose images are read once over all epochs, runs and processes of a node, as far as room goes.

    A process may be killed at any moment: what is incomplete fails its checksum and is read again. A set is a
    folder `KEY-N.images`: `images.data` has one image after the other and is locked while the set is in use;
    `images.table`, a sparse file, says where each row lies. Sets that nobody uses are removed when room is
    needed, the one that was opened longest ago first.

    Args:
        source: The source that is cached.
        folder: On a local disk, shared by all sets and processes; made if it does not exist.
        most_bytes: Of all sets in the folder together.
        key: Of the set, part of a file name; other content of any image requires another key.
    """

    def __init__(self, source: Source, folder: PathLike, most_bytes: int, key: str) -> None:
        self._source, self._folder, self._most, self._key = source, Path(folder), most_bytes, key
        self._full = most_bytes <= 0
        own = self._folder / f"{key}-{len(source)}{_ENDING}"
        self._folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._folder / _LOCK):  # so that nobody removes the set before its lock is held
            own.mkdir(exist_ok=True)
            self._table, self._data = handles = [_opened(own / name) for name in _NAMES]
            weakref.finalize(self, _close, handles)
            fcntl.flock(self._data, fcntl.LOCK_SH)
            os.utime(own)
            if os.fstat(self._table).st_size < len(source) * _ENTRY.size:
                os.ftruncate(self._table, len(source) * _ENTRY.size)

    def __reduce__(self) -> tuple[type[CachedSource], tuple[Source, Path, int, str]]:
        # A copy in another process opens the files anew: descriptors mean other files there.
        return CachedSource, (self._source, self._folder, self._most, self._key)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, rows: NDArray[np.int64]) -> Sequence[bytes | NDArray[np.uint8]]:
        """See `Source`; what is not kept is read from the source in one call."""
        found: dict[int, bytes | NDArray[np.uint8] | None] = {row: self._kept(row) for row in rows.tolist()}
        absent = [row for row, image in found.items() if image is None]
        if absent:
            fresh = read_rows(self._source, np.array(absent, np.int64))
            found.update(zip(absent, fresh, strict=True))
            if not self._full:
                self._keep(absent, fresh)
        return [found[row] for row in rows.tolist()]  # type: ignore[misc]

    def _kept(self, row: int) -> bytes | None:
        """The image of a row, None if it is not kept or damaged."""
        entry = os.pread(self._table, _ENTRY.size, row * _ENTRY.size)
        offset, size, checksum = _ENTRY.unpack(entry) if len(entry) == _ENTRY.size else (0, 0, 0)
        if not size or offset + size > os.fstat(self._data).st_size:
            return None  # a damaged entry might require any amount of memory
        data = os.pread(self._data, size, offset)
        return data if zlib.crc32(data, row & 0xFFFFFFFF) == checksum else None

    def _keep(self, rows: list[int], images: list[NDArray[np.uint8]]) -> None:
        """Writes as many of the images as there is room for; a disk that fails costs a warning."""
        try:
            offset, count = self._room([image.size for image in images])
            for row, image in list(zip(rows, images, strict=True))[:count]:
                if 0 < image.size < 1 << 32:
                    # What is written in part only fails its checksum.
                    checksum = zlib.crc32(image.data, row & 0xFFFFFFFF)
                    os.pwrite(self._data, image.data, offset)
                    os.pwrite(self._table, _ENTRY.pack(offset, image.size, checksum), row * _ENTRY.size)
                    offset += image.size
        except OSError as error:
            self._full = True
            words = f"No more images are kept in {str(self._folder)!r} ({error.strerror})"
            warnings.warn(f"{words}; they are read from their source.", stacklevel=2)

    def _room(self, sizes: list[int]) -> tuple[int, int]:
        """Reserves room for the first images of these sizes: (offset, how many of them)."""
        needs = np.cumsum(sizes) + _PAGE * np.arange(1, len(sizes) + 1)
        with _locked(self._folder / _LOCK):
            sets = sorted(self._folder.glob(f"*{_ENDING}"), key=os.path.getmtime)
            left = self._most - sum(map(_bytes, sets))
            for other in sets:
                if left < needs[-1]:
                    left += _removed(other)
            count = int((needs <= left).sum())
            self._full = count < len(sizes)
            offset = os.fstat(self._data).st_size
            if count:
                os.posix_fallocate(self._data, offset, max(1, sum(sizes[:count])))
        return offset, count


def _opened(file: Path) -> int:
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _close(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)


@contextmanager
def _locked(file: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Holds a lock against all threads and processes."""
    handle = _opened(file)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


def _removed(own: Path) -> int:
    """Removes a set unless a process holds it, as this one does its own; the bytes that this frees."""
    before = _bytes(own)
    with suppress(OSError), _locked(own / _NAMES[-1], fcntl.LOCK_EX | fcntl.LOCK_NB):
        for name in _NAMES:
            (own / name).unlink(missing_ok=True)
        own.rmdir()
    return before - _bytes(own)


def _bytes(own: Path) -> int:
    """Bytes of a set on the disk; a sparse file takes what was written."""
    return sum(512 * file.stat().st_blocks for file in own.glob("images.*"))
