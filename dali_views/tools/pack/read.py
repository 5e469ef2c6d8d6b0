"""The encoded images that are packed: read in blocks of neighbouring rows, worked on by threads, in order."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ...data.index import SampleIndex
from ...data.source import GONE, SourceGoneError, read_each, reason
from .image import Encoded

_BLOCK = 8  # rows that a thread reads at a time: a source may be faster so, and few images are in memory

A = TypeVar("A")
B = TypeVar("B")


@contextmanager
def pack_bar(what: str, total: int, progress: bool) -> Iterator[Any]:
    """tqdm's bar; under it nobody hears Pillow warn of odd EXIF and of large images."""
    with (
        tqdm(total=total, desc=what, unit=" images", delay=1, disable=None if progress else True) as bar,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield bar


def blocks(rows: range) -> list[range]:
    """The rows, parted into blocks for `read_block`."""
    return [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]


def read_block(index: SampleIndex, rows: Sequence[int]) -> Sequence[Encoded | str]:
    """The encoded image of each row, of an array its PNG; or why it cannot be read.

    Raises:
        SourceGoneError: The whole source cannot be read.
    """
    if index.arrays is not None:
        return [_png(index.arrays[row]) for row in rows]
    if index.source is None:
        return [_file(index.path(row)) for row in rows]
    try:
        images = read_each(index.source, np.array(rows, np.int64))
    except GONE as error:
        raise SourceGoneError(
            f"The source of the images is gone ({error}); bring it back and pack again, to go on."
        ) from error
    # Of a slice with gaps nothing else could read the memory.
    return [one if isinstance(one, str) else np.ascontiguousarray(one).data for one in images]


def in_order(
    threads: ThreadPoolExecutor, work: Callable[[A], B], tasks: Iterable[A], ahead: int
) -> Generator[B, None, None]:
    """The results of tasks in their order; no more than `ahead` wait, where `Executor.map` keeps all."""
    waiting: deque[Future[B]] = deque()
    try:
        for task in tasks:
            waiting.append(threads.submit(work, task))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _png(pixels: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _file(path: str) -> bytes | str:
    try:
        # A pipe of that name would keep an open that blocks waiting.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            return file.read() if regular else "not a regular file"
    except (OSError, ValueError) as error:
        return reason(error)
