"""Source: encoded images that Python code reads, for data sets that are no folders of files."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..system.files import open_regular, unpack_names

Form: TypeAlias = Literal["names", "bytes", "pixels"]
"""Where the images are: in files of their own, in a source of encoded bytes, or decoded in memory."""

AHEAD = 2
"""Batches that are read beside the one that the graph receives next."""

_READERS = 8
_PART = 16  # images that a thread reads at a time: enough per request, few enough to share out a batch
_OPEN = 256  # files that a process keeps open, over all indexes

SPARE_BYTES = 64 << 20
"""What may come with the pixels of an image (EXIF, colour profiles, a film), and most of what a header is."""
_PIXEL = 8  # bytes: four channels of 16 bits


class SourceGoneError(OSError):
    """A whole source cannot be read; its images are not the cause."""


GONE = (SourceGoneError, ConnectionError)
"""Errors of `Source.read` that end a run; any other makes bad images of the rows that raise it."""


class Source(Protocol):
    """N encoded images (JPEG, PNG, ...) in a table, an archive, a bucket, numbered from 0."""

    def __len__(self) -> int:
        """The number of images; it does not change."""

    def read(self, rows: NDArray[np.int64]) -> Sequence[bytes | NDArray[np.uint8]]:
        """The encoded images of rows (n,), in any order and maybe with repetitions.

        Several threads call it at once, each with a part of a batch. It may return memory that the source
        keeps, if nobody changes it. The source itself repeats requests after a failure of the network.

        Returns:
            n times bytes, or a 1-D array of uint8, in the order of `rows`.

        Raises:
            SourceGoneError, ConnectionError: The whole source cannot be read; this ends the run.
            Exception: Any other. Then each row is requested alone; one that raises again is a bad image.
        """


class Picked:
    """Some rows (n,) of a source, in the order given, as a source; a part of a part reads from the whole."""

    def __init__(self, source: Source, rows: NDArray[np.int64]) -> None:
        part = source if isinstance(source, Picked) else None
        self.whole: Source = source if part is None else part.whole
        self.rows: NDArray[np.int64] = rows if part is None else part.rows[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: NDArray[np.int64]) -> Sequence[bytes | NDArray[np.uint8]]:
        """See `Source`."""
        return self.whole.read(self.rows[rows])


def read_rows(source: Source, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """The encoded images of rows (n,) as 1-D arrays; a TypeError if the source breaks the protocol."""
    found = source.read(rows)
    arrays = [np.frombuffer(one, np.uint8) if isinstance(one, bytes) else one for one in found]
    if len(arrays) != len(rows):
        raise TypeError(f"the source returned {len(arrays)} images for {len(rows)} rows")
    for one in arrays:
        if not isinstance(one, np.ndarray) or one.dtype != np.uint8 or one.ndim != 1:
            raise TypeError(f"the source returned {type(one).__name__}, not bytes or a 1-D array of uint8")
    return arrays


def read_each(source: Source, rows: NDArray[np.int64]) -> list[NDArray[np.uint8] | str]:
    """As `read_rows`, but for a row that fails also alone the reason. `GONE` is raised."""
    try:
        return [*read_rows(source, rows)] if len(rows) else []
    except GONE:
        raise
    except Exception as error:
        if len(rows) == 1:
            return [reason(error)]
    return [one for row in rows for one in read_each(source, row[None])]


def reason(error: Exception) -> str:
    """Why an image is left out whose bytes could not be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot be read ({' '.join(words.split()) or type(error).__name__})"


@contextmanager
def needs(package: str) -> Iterator[None]:
    """For a block that imports an optional package; a ValueError if it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        extra = "cloud" if package == "obstore" else "tables"
        words = f"These images are read with {package}, which is not installed; pip install {package}"
        raise ValueError(f"{words}, or the extra {extra!r} of dali-views.") from error


class Reading(NamedTuple):
    """The images of one batch, which threads are reading in parts."""

    parts: list[tuple[int, Future[list[NDArray[np.uint8]]]]]  # how many, and their future

    def wait(self) -> list[NDArray[np.uint8]]:
        """B times the encoded bytes (1-D), in order; one zero byte where reading failed.

        This is no image, so that the graph fails for the batch in its turn, and each row is tried alone.
        """
        images: list[NDArray[np.uint8]] = []
        for count, part in self.parts:
            images += [np.zeros(1, np.uint8)] * count if part.exception() else part.result()
        return images


class ReadAhead:
    """Threads that read a source, from the first `ask` to `forget`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._threads: ThreadPoolExecutor | None = None

    def ask(self, rows: NDArray[np.int64]) -> Reading:
        """Starts to read rows (B,); earlier requests come first."""
        self._threads = threads = self._threads or ThreadPoolExecutor(_READERS, "dali_views read")
        parts = [rows[start : start + _PART] for start in range(0, len(rows), _PART)]
        return Reading([(len(part), threads.submit(read_rows, self._source, part)) for part in parts])

    def forget(self) -> None:
        """Drops what was asked and not yet begun, and ends the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None


class Window(io.RawIOBase):
    """`size` bytes of a file from `offset` on; `read_at` fills a buffer from a position, returns how far."""

    def __init__(self, read_at: Callable[[memoryview, int], int], offset: int, size: int) -> None:
        self._read_at, self._offset, self._size, self._at = read_at, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if self._at < 0:
            raise ValueError("sought before the start")
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        read = self._read_at(memoryview(buffer)[:wanted], self._offset + self._at)
        self._at += read
        return read


def window(file: Any, offset: int, size: int) -> io.BufferedReader:
    """`size` bytes of an open file from `offset` on; reading moves the position of the file."""

    def read_at(buffer: memoryview, at: int) -> int:
        file.seek(at)
        return int(file.readinto(buffer))

    return io.BufferedReader(Window(read_at, offset, size))


def open_stamped(path: str, stamp: tuple[int, int] | None = None) -> int:
    """Opens a regular file of this stamp (bytes, mtime_ns), or an OSError; the caller closes it."""
    handle, status = open_regular(path)
    if stamp in (None, (status.st_size, status.st_mtime_ns)):
        return handle
    os.close(handle)
    changed = f"{os.path.basename(path)} has changed since it was indexed (its size or its time)"
    raise OSError(f"{changed}; index it again, or restore the old file with its time")


def most_bytes(height: int, width: int) -> int:
    """Bytes that the file of an image of this size may have."""
    return _PIXEL * height * width + SPARE_BYTES


@dataclass(frozen=True, eq=False)
class FileSource:
    """Local files with an image each, as a `Source`. What has become of a file since it was indexed is not
    known: only regular files are read, and no more of them than an image of the known size takes."""

    root: str
    paths: NDArray[np.uint8]  # (N, L) relative to the root, NUL-padded
    sizes: NDArray[np.int32]  # (N, 2) height and width

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, rows: NDArray[np.int64]) -> list[bytes]:
        """See `Source`; an OSError for a file that cannot be read or is too large."""
        start = os.path.join(os.fsencode(self.root), b"")
        names, sizes = unpack_names(self.paths[rows]), self.sizes[rows].tolist()
        return [_whole(start + name, most_bytes(*size)) for name, size in zip(names, sizes, strict=True)]


def _whole(path: bytes, most: int) -> bytes:
    handle, status = open_regular(path)
    with open(handle, "rb", buffering=0) as file:
        if status.st_size > most:
            raise OSError(f"{status.st_size} bytes, more than the {most} that its pixels can take")
        return file.read(status.st_size)  # not to its end: it may be growing


@dataclass(frozen=True, eq=False)
class RangeSource:
    """Pieces of larger files (tar shards, tables), as a `Source`. A file must be as it was when scanned."""

    root: str
    files: Sequence[str]  # S names, relative to the root
    stamps: NDArray[np.int64]  # (S, 2) bytes and mtime_ns of each file when it was scanned
    places: NDArray[np.int64]  # (N, 3) file, offset and bytes of each image

    def __len__(self) -> int:
        return len(self.places)

    def read(self, rows: NDArray[np.int64]) -> list[bytes]:
        """See `Source`; an OSError for a file that is missing, has changed or cannot be read."""
        images: list[bytes] = []
        for file, offset, size in self.places[rows].tolist():
            path = os.path.join(self.root, self.files[file])
            # Held, or another thread might have it closed.
            opened = _opened(path, *self.stamps[file].tolist())
            images.append(os.pread(opened.handle, size, offset))
            if len(images[-1]) < size:
                raise OSError(f"{self.files[file]} was truncated since it was indexed")
        return images


class _Opened:
    """An open file, closed when nobody reads it any more."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self) -> None:
        os.close(self.handle)


@lru_cache(_OPEN)
def _opened(path: str, size: int, mtime_ns: int) -> _Opened:
    return _Opened(open_stamped(path, (size, mtime_ns)))
