"""RangeSource: images as pieces of larger files (tar shards, tables), read by their offsets in any order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .stamped_file import open_stamped

_OPEN = 256  # files that a process holds open at a time, over all indexes


@dataclass(frozen=True, eq=False)
class RangeSource:
    """Images as ranges of bytes, as a `Source`. A file must be as it was when it was scanned."""

    root: str
    """Folder that the names start from."""
    files: Sequence[str]
    stamps: NDArray[np.int64]
    """(S, 2) bytes and mtime_ns of each file when it was scanned."""
    places: NDArray[np.int64]
    """(N, 3) file, offset and bytes of each image."""

    def __len__(self) -> int:
        return len(self.places)

    def read(self, rows: NDArray[np.int64]) -> list[bytes]:
        """See `Source`; an OSError for a file that is missing, has changed or cannot be read."""
        return [self._range(*place) for place in self.places[rows].tolist()]

    def _range(self, file: int, offset: int, size: int) -> bytes:
        path = os.path.join(self.root, self.files[file])
        opened = _opened(path, *self.stamps[file].tolist())  # held, or another thread might have it closed
        data = os.pread(opened.handle, size, offset)
        if len(data) < size:
            raise OSError(f"{self.files[file]} has been cut off since it was indexed")
        return data


class _Opened:
    """An open file, closed when nobody reads it any more."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self) -> None:
        os.close(self.handle)


@lru_cache(_OPEN)
def _opened(path: str, size: int, mtime_ns: int) -> _Opened:
    return _Opened(open_stamped(path, (size, mtime_ns)))
