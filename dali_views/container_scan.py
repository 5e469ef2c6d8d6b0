"""What a scan of files that hold many images each has found: tar shards, tables."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .scan_cache import stamp_of
from .sources import LeftOut
from .stored_source import Holder


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
        paths = [os.path.join(self.root, name) for name in self.files]
        stamps = self.file_stamps.tolist()
        return all(stamp_of(path) == tuple(stamp) for path, stamp in zip(paths, stamps, strict=True))
