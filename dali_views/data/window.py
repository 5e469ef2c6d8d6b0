"""A piece of a file as a file of its own."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import partial
from typing import Any


class Window(io.RawIOBase):
    """The bytes of a file from `offset` on, `size` of them, read-only.

    Args:
        read_at: Reads into a buffer from a place in the file on, and tells how many bytes: `of_handle` or
            `of_file`.
    """

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


def of_handle(handle: int) -> Callable[[memoryview, int], int]:
    """Reads of an open file by its descriptor, as many at a time as one likes."""
    return partial(_pread, handle)


def of_file(file: io.RawIOBase | io.BufferedReader) -> Callable[[memoryview, int], int]:
    """Reads of any file object, whose place they move."""
    return partial(_seek_and_read, file)


def _pread(handle: int, buffer: memoryview, at: int) -> int:
    return os.preadv(handle, [buffer], at)


def _seek_and_read(file: Any, buffer: memoryview, at: int) -> int:
    file.seek(at)
    return int(file.readinto(buffer) or 0)
