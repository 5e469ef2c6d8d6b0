"""RemoteFile: an object of a store as a file that can be sought in, for tarfile, Pillow and pyarrow."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from typing import Any

from ..system.files import PathLike
from .remote import Entry, bucket_of

WALK = 4 << 20
"""Bytes of a block for a file that is read from its start to its end."""
HEADER = 32 << 10
"""Bytes of a block for the header of an image."""

_BLOCKS = 8  # kept of one file


class RemoteFile(io.RawIOBase):
    """An object, read in blocks of which the last used are kept.

    Args:
        url: Of the object.
        block: Bytes of one request.
        entry: What a listing said of the object; without it, the store is asked.

    Raises:
        FileNotFoundError: It is not there.
        SourceGoneError: See `remote.Bucket`; reading raises the same.
        OSError: While reading: it has changed since it was listed or opened.
    """

    def __init__(self, url: PathLike, block: int = WALK, entry: Entry | None = None) -> None:
        self._bucket, self._key = bucket_of(url)
        self.entry = entry if entry is not None else self._bucket.stat(self._key)
        """Its size and version; the name is the listing's."""
        self._block, self._at = block, 0
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """See `io.RawIOBase`."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.entry.size}[whence]
        if base + offset < 0:
            raise ValueError("sought before the start")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """See `io.RawIOBase`; fills the buffer, up to the end of the object."""
        wanted = max(0, min(len(buffer), self.entry.size - self._at))
        if wanted > self._block:
            buffer[:wanted] = self._fetched(self._at, wanted)
        else:
            filled = 0
            while filled < wanted:
                number, skip = divmod(self._at + filled, self._block)
                part = self._of(number)[skip : skip + wanted - filled]
                buffer[filled : filled + len(part)] = part
                filled += len(part)
        self._at += wanted
        return wanted

    def _of(self, number: int) -> bytes:
        if number in self._kept:
            self._kept.move_to_end(number)
        else:
            start = number * self._block
            self._kept[number] = self._fetched(start, min(self._block, self.entry.size - start))
            if len(self._kept) > _BLOCKS:
                self._kept.popitem(last=False)
        return self._kept[number]

    def _fetched(self, start: int, count: int) -> bytes:
        found = self._bucket.read(self._key, start, count, self.entry.version or None)
        if len(found) < count:
            raise OSError("it is shorter than it was when it was listed")
        return found
