"""GroupSource: images in row groups of Parquet files or in compressed batches of Arrow files.

An image is read by decoding its group. Few groups stay decoded: reading in order decodes each once, reading
in random order mostly one per image.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .table_file import byte_arrays, damage_as_os_error, leaf, open_table

_LEAST = 2  # groups that stay whatever their size: threads that read in order stand in up to two at a time


def _kept_bytes() -> int:
    told = os.environ.get("DALI_VIEWS_GROUP_MB", "256")
    if not told.isdecimal():
        raise ValueError(f"DALI_VIEWS_GROUP_MB is a number of megabytes; got {told!r}.")
    return int(told) << 20


KEPT_BYTES = _kept_bytes()
"""Decoded groups that a process keeps, over all indexes; $DALI_VIEWS_GROUP_MB, by default 256 MB."""

Group: TypeAlias = "list[NDArray[np.uint8] | None]"


@dataclass
class GroupCache:
    """The groups that were used last. One that several threads ask for is decoded by one of them."""

    most_bytes: int
    used_bytes: int = 0
    _kept: OrderedDict[Hashable, Group] = field(default_factory=OrderedDict)
    _coming: dict[Hashable, Future[Group]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: Hashable, decode: Callable[[], Group]) -> Group:
        """The group, decoded now if it is not kept; an error is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            coming = self._coming.get(key)
            if coming is None:
                mine = self._coming[key] = Future()
        if coming is not None:
            return coming.result()
        try:
            group = decode()
        except BaseException as error:
            with self._lock:
                del self._coming[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._coming[key]
            self._kept[key] = group
            self.used_bytes += _bytes(group)
            while self.used_bytes > self.most_bytes and len(self._kept) > _LEAST:
                self.used_bytes -= _bytes(self._kept.popitem(last=False)[1])
        mine.set_result(group)
        return group


def _bytes(group: Group) -> int:
    return sum(image.nbytes for image in group if image is not None)


_CACHE = GroupCache(KEPT_BYTES)


@dataclass(frozen=True, eq=False)
class GroupSource:
    """Images in groups of tables, as a `Source`. A file must be as it was when it was scanned."""

    root: str
    """Folder that the names start from."""
    files: Sequence[str]
    stamps: NDArray[np.int64]
    """(S, 2) bytes and mtime_ns of each file when it was scanned."""
    places: NDArray[np.int64]
    """(N, 3) file, group in it and row in that of each image."""
    column: str
    """Column with the encoded bytes, or field of one, as "image.bytes"."""

    def __len__(self) -> int:
        return len(self.places)

    def read(self, rows: NDArray[np.int64]) -> list[bytes]:
        """See `Source`; an OSError for a file that is missing, has changed or cannot be read."""
        places = self.places[rows]
        images = [b""] * len(rows)
        for file, group in np.unique(places[:, :2], axis=0).tolist():
            values = self._group(file, group)
            for i in np.flatnonzero((places[:, 0] == file) & (places[:, 1] == group)).tolist():
                row = int(places[i, 2])
                image = values[row] if row < len(values) else None
                if image is None:
                    raise OSError(f"{self.files[file]} has no image in row {row} of its group {group}")
                # A copy, for a view would keep the whole group in memory as long as the batch.
                images[i] = image.tobytes()
        return images

    def _group(self, file: int, group: int) -> Group:
        path, stamp = os.path.join(self.root, self.files[file]), tuple(self.stamps[file].tolist())
        return _CACHE.get((path, stamp, self.column, group), lambda: self._decoded(path, stamp, group))

    def _decoded(self, path: str, stamp: tuple[int, int], group: int) -> Group:
        with open_table(path, stamp) as table, damage_as_os_error():
            return byte_arrays(leaf(table.read(group, [self.column])[0], self.column))
