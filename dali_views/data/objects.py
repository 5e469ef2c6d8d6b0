"""Images in an object store, whole objects or pieces of larger ones, read many at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .remote import Part, keys_below


@dataclass(frozen=True, eq=False)
class ObjectSource:
    """Whole objects, as a `Source`. An object must be as it was when it was scanned."""

    root: str
    """URL that the names start from."""
    paths: NDArray[np.uint8]
    """(N, L) names, NUL-padded."""
    places: NDArray[np.int64]
    """(N, 3) 0, version and bytes of each."""

    def __len__(self) -> int:
        return len(self.places)

    def read(self, rows: NDArray[np.int64]) -> list[bytes]:
        """See `Source`; FileNotFoundError for an object that is gone, OSError for one that has changed."""
        names = [os.fsdecode(name.tobytes().rstrip(b"\0")) for name in self.paths[rows]]
        bucket, keys = keys_below(self.root, names)
        told = self.places[rows].tolist()
        parts = [Part(key, version=version or None) for key, (_, version, _) in zip(keys, told, strict=True)]
        return _whole(bucket.read_parts(parts), [size for _, _, size in told])


@dataclass(frozen=True, eq=False)
class RemoteRangeSource:
    """Pieces of objects (tar shards), as a `Source`. An object must be as it was when it was scanned."""

    root: str
    """URL that the names start from."""
    files: Sequence[str]
    stamps: NDArray[np.int64]
    """(S, 2) bytes and version of each object when it was scanned."""
    places: NDArray[np.int64]
    """(N, 3) object, offset and bytes of each image."""

    def __len__(self) -> int:
        return len(self.places)

    def read(self, rows: NDArray[np.int64]) -> list[bytes]:
        """See `ObjectSource.read`."""
        told = self.places[rows].tolist()
        bucket, keys = keys_below(self.root, [self.files[file] for file, _, _ in told])
        parts = [
            Part(key, offset, size, int(self.stamps[file, 1]) or None)
            for key, (file, offset, size) in zip(keys, told, strict=True)
        ]
        return _whole(bucket.read_parts(parts), [size for _, _, size in told])


def _whole(found: list[bytes], sizes: list[int]) -> list[bytes]:
    if [len(one) for one in found] != sizes:
        raise OSError("its size has changed since it was indexed; index the images again")
    return found
