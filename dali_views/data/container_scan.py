"""What a scan of files that hold many images each has found: tar shards, tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .headers import cores, scan_bar
from .listing import LeftOut
from .remote import is_remote
from .remote_scan import object_stamps
from .scan_cache import stamp_of
from .scan_workers import in_workers
from .store import Holder

_SMALL = 1 << 30  # bytes of files that threads look through sooner than processes have started
_THREADS = 4  # more wait for the interpreter, not for the disk
_REQUESTS = 16  # files in a store that are looked through at a time

J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class ContainerScan:
    """The images after the scan, and what the files looked like then; fields are those of `SampleIndex`."""

    root: str
    paths: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    labels: NDArray[np.int32]
    classes: list[str]
    left_out: list[LeftOut]
    holder: Holder
    files: list[str]
    file_stamps: NDArray[np.int64]
    places: NDArray[np.int64] | None = None
    column: str = ""

    def holds(self) -> bool:
        """Whether all files still look the same."""
        stamps = self.file_stamps.tolist()
        if is_remote(self.root):
            return object_stamps(self.root, self.files) == [tuple(stamp) for stamp in stamps]
        paths = [os.path.join(self.root, name) for name in self.files]
        return all(stamp_of(path) == tuple(stamp) for path, stamp in zip(paths, stamps, strict=True))


def look_through(
    look: Callable[[J], R],
    jobs: Sequence[J],
    size: int,
    processes: int | None,
    kind: str,
    progress: bool,
    requests: bool = False,
) -> list[R]:
    """What a function tells of each file, in their order, several at a time.

    Args:
        look: Of the top level of a module; it does not raise.
        jobs: What it takes, one for each file.
        size: Bytes of all files.
        processes: Worker processes; 0 means threads in this process. By default threads below 1 GiB and one
            process per core from there on.
        kind: What the files are called.
        progress: Shows a bar on a terminal.
        requests: The files are in a store, whose answers threads await.
    """
    if requests:
        processes = 0
    elif processes is None:
        processes = 0 if size < _SMALL else min(cores(), len(jobs))
    found = []
    with (
        in_workers(look, processes) as look_at,
        ThreadPoolExecutor(_REQUESTS if requests else processes or _THREADS) as threads,
        scan_bar(len(jobs), f" {kind}", progress) as bar,
    ):
        for one in threads.map(look_at, jobs):
            found.append(one)
            bar.update()
    return found


def size_of(paths: Sequence[str]) -> int:
    """Bytes of those files that are there."""
    return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
