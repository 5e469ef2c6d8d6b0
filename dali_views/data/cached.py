"""CachedSource: the encoded images of a slow source, kept on a local disk within a bound.

What is kept stays as long as its set is in use: an epoch asks for each image once, so that whatever is thrown
out for another image is missed before that one is of use again. When the room is over, further images are
passed on as they come.
"""

from __future__ import annotations

import fcntl
import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..system.files import PathLike
from .source import Source, read_rows

_ENTRY = struct.Struct("<QII")  # offset in the data, bytes (0: not kept), CRC-32 of row and bytes
_PAGE = 4096  # bytes that the first entry in a part of the sparse table takes
_ENDING = ".images"  # of the folder of a set; nothing else is counted or removed
_NAMES = _LOCK, _TABLE, _DATA = "images.lock", "images.table", "images.data"


class CachedSource:
    """A source whose images are read once over all epochs, runs and processes of a node, as far as room goes.

    A process may be killed at any moment: what is not whole fails its checksum and is read anew. A set is a
    folder `KEY-N.images`: `images.data` has one image after the other; `images.table`, a sparse file, tells
    where each row lies; `images.lock` is held as long as the set is in use. Sets that nobody uses are removed
    when room is needed, the one that was opened longest ago first.

    Args:
        source: What is read.
        folder: On a local disk, shared by all sets and processes; made if it is not there.
        most_bytes: That all sets in the folder may take together.
        key: Of the set, part of a file name; another content of any image must have another key.

    Raises:
        OSError: The folder cannot be made or written.
    """

    def __init__(self, source: Source, folder: PathLike, most_bytes: int, key: str) -> None:
        self._source = source
        self._folder = Path(folder)
        self._most = most_bytes
        self._key = key
        self._full = most_bytes <= 0
        self._own = self._folder / f"{key}-{len(source)}{_ENDING}"
        self._folder.mkdir(parents=True, exist_ok=True)
        with _alone(self._folder):  # so that nobody removes the set before it is held
            self._own.mkdir(exist_ok=True)
            self._files = _Files(self._own)
            fcntl.flock(self._files.lock, fcntl.LOCK_SH)
            os.utime(self._own / _LOCK)
            if os.fstat(self._files.table).st_size < len(source) * _ENTRY.size:
                os.ftruncate(self._files.table, len(source) * _ENTRY.size)

    def __reduce__(self) -> tuple[type[CachedSource], tuple[Source, Path, int, str]]:
        # A copy in another process opens the files anew: numbers of open files mean others there.
        return CachedSource, (self._source, self._folder, self._most, self._key)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, rows: NDArray[np.int64]) -> Sequence[bytes | NDArray[np.uint8]]:
        """See `Source`; what is not kept is asked of the source in one piece."""
        found: dict[int, bytes | NDArray[np.uint8]] = {}
        absent: list[int] = []
        for row in dict.fromkeys(rows.tolist()):
            kept = self._kept(row)
            if kept is None:
                absent.append(row)
            else:
                found[row] = kept
        if absent:
            fresh = read_rows(self._source, np.array(absent, np.int64))
            found.update(zip(absent, fresh, strict=True))
            if not self._full:
                self._keep(absent, fresh)
        return [found[row] for row in rows.tolist()]

    def _kept(self, row: int) -> bytes | None:
        """The image of a row, None if it is not kept or not whole."""
        entry = os.pread(self._files.table, _ENTRY.size, row * _ENTRY.size)
        offset, size, told = _ENTRY.unpack(entry) if len(entry) == _ENTRY.size else (0, 0, 0)
        if not size or offset + size > os.fstat(self._files.data).st_size:
            return None  # a torn entry might ask for any amount of memory
        data = os.pread(self._files.data, size, offset)
        return data if len(data) == size and zlib.crc32(data, _seed(row)) == told else None

    def _keep(self, rows: list[int], images: list[NDArray[np.uint8]]) -> None:
        """Writes as many of the images as there is room for; a disk that fails costs a warning."""
        try:
            offset, count = self._room([image.size for image in images])
            for row, image in list(zip(rows, images, strict=True))[:count]:
                if not 0 < image.size < 1 << 32:
                    continue
                _write(self._files.data, image.data, offset)
                entry = _ENTRY.pack(offset, image.size, zlib.crc32(image.data, _seed(row)))
                _write(self._files.table, entry, row * _ENTRY.size)
                offset += image.size
        except OSError as error:
            self._full = True
            warnings.warn(
                f"No more images are kept in {str(self._folder)!r} ({error.strerror}); they are read from "
                "their source.",
                stacklevel=2,
            )

    def _room(self, sizes: list[int]) -> tuple[int, int]:
        """Takes room for the first images of these sizes: (offset, how many of them)."""
        with _alone(self._folder):
            sets = sorted(self._folder.glob(f"*{_ENDING}"), key=_opened)
            left = self._most - sum(map(_bytes, sets))
            for other in sets:
                if left >= sum(sizes) + _PAGE * len(sizes):
                    break
                left += _removed(other)
            fits = np.cumsum(sizes) + _PAGE * np.arange(1, len(sizes) + 1) <= left
            count = int(fits.sum())
            self._full = count < len(sizes)
            offset = os.fstat(self._files.data).st_size
            if count:
                os.posix_fallocate(self._files.data, offset, max(1, sum(sizes[:count])))
        return offset, count


class _Files:
    """The open files of a set, closed with it."""

    def __init__(self, folder: Path) -> None:
        self.lock, self.table, self.data = (
            os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            for name in (_LOCK, _TABLE, _DATA)
        )

    def __del__(self) -> None:
        for handle in vars(self).values():
            os.close(handle)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock against all threads and processes."""
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _removed(own: Path) -> int:
    """Removes a set unless a process holds it, as this one does its own; the bytes that this frees."""
    before = _bytes(own)
    with suppress(OSError):
        handle = os.open(own / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in _NAMES:
                (own / name).unlink(missing_ok=True)
            own.rmdir()
        finally:
            os.close(handle)
    return before - _bytes(own)


def _bytes(own: Path) -> int:
    """That a set takes on the disk; a sparse file takes what was written."""
    taken = 0
    for name in _NAMES:
        with suppress(OSError):
            taken += 512 * (own / name).stat().st_blocks
    return taken


def _opened(own: Path) -> float:
    """When a set was opened last; one that is broken was never."""
    try:
        return (own / _LOCK).stat().st_mtime
    except OSError:
        return 0.0


def _write(handle: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view, offset = view[written:], offset + written


def _seed(row: int) -> int:
    """So that the checksum of a row holds for no other one."""
    return row & 0xFFFFFFFF
