"""The header scan, kept between runs: where it lies, and whether its files are still the same."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..system.files import PathLike
from .headers import Record
from .index_file import read_index, unpack_names, write_index
from .listing import LeftOut
from .store import Holder

CHECKED_FILES = 20_000
"""Up to so many files are compared by size and mtime before a kept scan is believed."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Scanned:
    """The images of a listing after the scan, and what the files looked like then.

    A stamp is (bytes, mtime_ns) of a file, (bytes, version) of an object, (-1, -1) where there is none.
    """

    root: str
    paths: NDArray[np.uint8]
    """(N, L) relative to the root, NUL-padded."""
    sizes: NDArray[np.int32]
    """(N, 2) stored height and width."""
    labels: NDArray[np.int32]
    """(N,)"""
    classes: list[str]
    left_out: list[LeftOut]
    """First the K files that the scan refused, then what the listing did."""
    stamp_files: NDArray[np.int64]
    """(N, 2) stamps of the images."""
    stamp_left: NDArray[np.int64]
    """(K, 2) stamps of the files that the scan refused."""
    stamp_folders: NDArray[np.bytes_]
    """(F,) folders that were read, relative to the root."""
    stamp_times: NDArray[np.int64]
    """(F,) their mtime_ns."""
    holder: Holder = ""
    places: NDArray[np.int64] | None = None
    """(N, 3) of objects in a store; see `stored_source`."""

    def records(self) -> dict[bytes, Record]:
        """What the scan said about each file it looked at."""
        rows = zip(unpack_names(self.paths), self.sizes.tolist(), self.stamp_files.tolist(), strict=True)
        known: dict[bytes, Record] = {name: (*size, *stamp, "") for name, size, stamp in rows}
        refused = zip(self.left_out, self.stamp_left.tolist(), strict=False)
        return known | {os.fsencode(f.path): (0, 0, *stamp, f.reason) for f, stamp in refused}

    def holds(self) -> bool:
        """Whether folders and files still look the same; of more than `CHECKED_FILES`, an even sample."""
        base = os.path.join(os.fsencode(self.root), b"")
        folders = zip(self.stamp_folders.tolist(), self.stamp_times.tolist(), strict=True)
        if any(stamp_of(base + name)[1] != time for name, time in folders):
            return False
        count = len(self.paths)
        rows = np.unique(np.linspace(0, count - 1, min(count, CHECKED_FILES)).astype(np.int64))
        names = unpack_names(self.paths[rows]) + [os.fsencode(f.path) for f in self.left_out]
        stamps = self.stamp_files[rows].tolist() + self.stamp_left[:CHECKED_FILES].tolist()
        # What the listing refused has no stamp: its reason does not lie in the file.
        return all(stamp_of(base + n) == tuple(stamp) for n, stamp in zip(names, stamps, strict=False))


def stamp_of(path: bytes | str) -> tuple[int, int]:
    """(bytes, mtime_ns) of a file, (-1, -1) where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a NUL in a name that someone else put into the file
        return -1, -1
    return status.st_size, status.st_mtime_ns


class ScanCache(Generic[T]):
    """The place of one kept scan, and what lies there."""

    def __init__(self, cache: bool | PathLike, root: str, options: object, kind: type[T]) -> None:
        """Looks the scan up.

        Args:
            cache: True means $DALI_VIEWS_CACHE, or dali_views in $XDG_CACHE_HOME, or ~/.cache/dali_views;
                a path means that folder; False means nowhere.
            root: The folder that was scanned.
            options: What else shaped the listing, JSON-able.
            kind: Dataclass of the scan, which has a `root`.
        """
        self.file: Path | None = None
        self.kept: T | None = None
        if cache is False:
            return
        if cache is True:
            own, shared = os.environ.get("DALI_VIEWS_CACHE"), os.environ.get("XDG_CACHE_HOME")
            folder = Path(own) if own else Path(shared or os.path.expanduser("~/.cache")) / "dali_views"
        else:
            folder = Path(cache)
        digest = hashlib.sha256(json.dumps([root, options]).encode()).hexdigest()[:16]
        name = "".join(c if c.isascii() and c.isalnum() else "_" for c in os.path.basename(root))[:40]
        self.file = folder / f"{name or 'root'}-{digest}.npz"
        try:
            kept: Any = read_index(self.file, kind)
        except (OSError, ValueError):
            return  # absent, damaged or wrong: the scan is done anew
        self.kept = kept if kept.root == root else None

    def keep(self, scanned: T) -> None:
        """Writes the scan; a place that cannot be written costs a warning."""
        if self.file is None:
            return
        try:
            write_index(self.file, scanned)
        except OSError as error:
            warnings.warn(
                f"The index is not kept: {str(self.file)!r} cannot be written ({error}).", stacklevel=5
            )
