"""Encoded images of coming batches, read by threads while the graph works on the batch before."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from .source import Source, read_rows

AHEAD = 2
"""Batches that are read beside the one that the graph receives next."""

_READERS = 8
_PART = 16  # images that a thread reads at a time: enough per request, few enough to share out a batch


class Reading:
    """The images of one batch, which threads are reading."""

    def __init__(self, parts: list[tuple[int, Future[list[NDArray[np.uint8]]]]]) -> None:
        self._parts = parts

    def wait(self) -> list[NDArray[np.uint8]]:
        """B times the encoded bytes (1-D), in order; one zero byte where reading failed.

        This is no image, so that the graph fails for the batch in its turn, and each row is tried alone.
        """
        images: list[NDArray[np.uint8]] = []
        for count, part in self._parts:
            images += [np.zeros(1, np.uint8)] * count if part.exception() else part.result()
        return images


class ReadAhead:
    """Threads that read a source, from the first `ask` to `forget`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._threads: ThreadPoolExecutor | None = None

    def ask(self, rows: NDArray[np.int64]) -> Reading:
        """Starts to read rows (B,); earlier requests come first."""
        self._threads = threads = self._threads or ThreadPoolExecutor(_READERS, "dali_views read")
        parts = [rows[start : start + _PART] for start in range(0, len(rows), _PART)]
        return Reading([(len(part), threads.submit(read_rows, self._source, part)) for part in parts])

    def forget(self) -> None:
        """Drops what was asked and not yet begun, and ends the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None
