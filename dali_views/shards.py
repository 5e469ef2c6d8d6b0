"""ShardSource: members of tar shards, read by their offsets, in any order over all shards."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_OPEN = 256  # shards that a process holds open at a time, over all indexes


@dataclass(frozen=True, eq=False)
class ShardSource:
    """The images of an index of shards, as a `Source`. A shard must be as it was when it was scanned."""

    root: str
    """Folder that the names start from."""
    shards: Sequence[str]
    stamps: NDArray[np.int64]
    """(S, 2) bytes and mtime_ns of each shard when it was scanned."""
    members: NDArray[np.int64]
    """(N, 3) shard, offset and bytes of each image."""

    def __len__(self) -> int:
        return len(self.members)

    def read(self, rows: NDArray[np.int64]) -> list[bytes]:
        """See `Source`; an OSError for a shard that is missing, has changed or cannot be read."""
        return [self._member(*place) for place in self.members[rows].tolist()]

    def _member(self, shard: int, offset: int, size: int) -> bytes:
        path = os.path.join(self.root, self.shards[shard])
        data = os.pread(_opened(path, *self.stamps[shard].tolist()).handle, size, offset)
        if len(data) < size:
            raise OSError("its shard has been cut off since it was indexed")
        return data


class _Shard:
    """An open shard, closed when nobody reads it any more."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self) -> None:
        os.close(self.handle)


@lru_cache(_OPEN)
def _opened(path: str, size: int, mtime_ns: int) -> _Shard:
    # A pipe of that name would keep an open that blocks waiting.
    shard = _Shard(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    status = os.fstat(shard.handle)
    if not stat.S_ISREG(status.st_mode) or (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
        raise OSError("its shard has changed since it was indexed; index the shards again")
    return shard
