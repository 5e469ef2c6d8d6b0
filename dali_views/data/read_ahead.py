"""Encoded images of coming batches, read by threads while the graph works on the batch before."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from .source import Source, read_rows

AHEAD = 2
"""Batches that are being read beside the one that the graph is given next."""

_READERS = 8
_PART = 16  # images that a thread reads at a time: enough for its errands, few enough to share out a batch

# No image: the graph fails for the batch in its turn, and each row of it is tried alone.
_UNREAD = np.zeros(1, np.uint8)


class Reading:
    """The images of one batch, on their way."""

    def __init__(self, parts: Sequence[tuple[int, Future[list[NDArray[np.uint8]]]]]) -> None:
        self._parts = parts

    def wait(self) -> list[NDArray[np.uint8]]:
        """B times the encoded bytes (1-D), in the order asked for; one zero byte where reading failed."""
        images: list[NDArray[np.uint8]] = []
        for count, part in self._parts:
            error = part.exception()
            images += [_UNREAD] * count if error is not None else part.result()
        return images


class ReadAhead:
    """Threads that read a source, from the first question to `forget`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._threads: ThreadPoolExecutor | None = None

    def ask(self, rows: NDArray[np.int64]) -> Reading:
        """Begin to read rows (B,); what was asked for earlier comes first."""
        self._threads = threads = self._threads or ThreadPoolExecutor(_READERS, "dali_views read")
        parts = [rows[start : start + _PART] for start in range(0, len(rows), _PART)]
        return Reading([(len(part), threads.submit(read_rows, self._source, part)) for part in parts])

    def forget(self) -> None:
        """Nobody waits for what was asked any more: what has not begun is not read, and the threads end."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None
