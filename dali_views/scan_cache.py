"""The stored header scan: where it lies, and whether the files it speaks of are still the same."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
"""Raised whenever the stored arrays or the rules of the scan change; older files are scanned anew."""

CHECKED_FILES = 20_000
"""Up to so many files are compared by size and mtime before a stored scan is believed."""


def cache_file(cache: bool | str | os.PathLike[str], root: str, options: object) -> Path | None:
    """The file for a root and the options that shaped its index; None when `cache` is False.

    `cache` True means $DALI_VIEWS_CACHE, or dali_views in $XDG_CACHE_HOME, or ~/.cache/dali_views;
    a path means that folder.
    """
    if cache is False:
        return None
    if cache is True:
        own, shared = os.environ.get("DALI_VIEWS_CACHE"), os.environ.get("XDG_CACHE_HOME")
        folder = Path(own) if own else Path(shared or os.path.expanduser("~/.cache")) / "dali_views"
    else:
        folder = Path(cache)
    digest = hashlib.sha256(json.dumps([root, options]).encode()).hexdigest()[:16]
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in os.path.basename(root))[:40]
    return folder / f"{name or 'root'}-{digest}.npz"


def write_npz(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes arrays and JSON-able facts, uncompressed, in one step that is never seen half done."""
    text = np.frombuffer(json.dumps({"format": FORMAT, **meta}).encode(), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with draft.open("wb") as file:
            np.savez(file, allow_pickle=False, meta=text, **arrays)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read_npz(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Reads what `write_npz` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, something else, or of another format version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        version = meta.pop("format")
    except FileNotFoundError:
        raise FileNotFoundError(f"The index file {str(path)!r} does not exist; check the path.") from None
    except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(path)!r} is damaged or no index ({error}); build it anew.") from error
    if version != FORMAT:
        raise ValueError(f"{str(path)!r} has format {version}, this version reads {FORMAT}; build it anew.")
    return meta, arrays


def stat_stamp(path: bytes) -> tuple[int, int]:
    """(bytes, mtime_ns) of a file; (-1, -1) where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


@dataclass
class Stamp:
    """What the files looked like when they were scanned."""

    files: NDArray[np.int64]
    """(N, 2) bytes and mtime_ns of the files in the index."""
    left: NDArray[np.int64]
    """(K, 2) the same for the first K files left out, those that the scan itself refused."""
    folders: dict[bytes, int] = field(default_factory=dict)
    """mtime_ns of every folder, by path relative to the root."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that `from_arrays` takes."""
        names = np.array(list(self.folders), dtype=np.bytes_)
        times = np.array(list(self.folders.values()), np.int64)
        return {
            "stamp_files": self.files,
            "stamp_left": self.left,
            "stamp_folders": names,
            "stamp_times": times,
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Stamp:
        """Takes the stamp's arrays out of `arrays`."""
        names, times = arrays.pop("stamp_folders"), arrays.pop("stamp_times")
        folders = dict(zip(names.tolist(), times.tolist(), strict=True))
        return cls(arrays.pop("stamp_files"), arrays.pop("stamp_left"), folders)

    def holds(self, root: str, paths: NDArray[np.uint8], left_out: Iterable[str]) -> bool:
        """Whether folders and files still look the same; of more than `CHECKED_FILES`, an even sample."""
        base = os.path.join(os.fsencode(root), b"")
        if any(stat_stamp(base + name)[1] != time for name, time in self.folders.items()):
            return False
        count = len(paths)
        rows = np.unique(np.linspace(0, count - 1, min(count, CHECKED_FILES)).astype(np.int64))
        wanted = self.files[rows].tolist()
        for name, stamp in zip(paths[rows], wanted, strict=True):
            if stat_stamp(base + name.tobytes().rstrip(b"\0")) != tuple(stamp):
                return False
        left = zip(left_out, self.left[:CHECKED_FILES].tolist(), strict=False)
        return all(stat_stamp(base + os.fsencode(name)) == tuple(stamp) for name, stamp in left)
