"""Sizes of the images of a source: as told, or from their headers, and which of them cannot be used."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .headers import MAX_PIXELS, inspect, scan_bar
from .listing import LeftOut
from .source import Source, read_each

_THREADS = 8
_CHUNK = 64


class SourceScan(NamedTuple):
    """The usable images of a source."""

    rows: NDArray[np.int64]
    """(n,) in the source."""
    names: list[str]
    sizes: NDArray[np.int32]
    """(n, 2) stored height and width."""
    left_out: list[LeftOut]


def scan_source(
    source: Source, sizes: ArrayLike | None, names: Sequence[str] | None, progress: bool
) -> SourceScan:
    """Carries out `SampleIndex.from_source`, which explains the arguments and what is raised."""
    count = len(source)
    told = [f"row {row}" for row in range(count)] if names is None else list(names)
    if len(told) != count or len(set(told)) != count or any(not name or "\0" in name for name in told):
        raise ValueError(f"names must be {count} different texts without NULs, one for each image.")
    if sizes is not None:
        return SourceScan(np.arange(count), told, _checked(sizes, count), [])
    found = _look(source, count, progress)
    good = np.array([not refused for _, _, refused in found], np.bool_)
    left_out = [LeftOut(name, refused) for name, (_, _, refused) in zip(told, found, strict=True) if refused]
    if not good.any():
        first = "; ".join(f"{name}: {refused}" for name, refused in left_out[:3])
        raise ValueError(f"None of the {count} images of the source is usable ({first}); check it.")
    rows = np.flatnonzero(good)
    table = np.array([found[row][:2] for row in rows.tolist()], np.int32)
    return SourceScan(rows, [told[row] for row in rows.tolist()], table, left_out)


def _checked(sizes: ArrayLike, count: int) -> NDArray[np.int32]:
    given = np.asarray(sizes)
    if given.dtype.kind not in "iu":
        raise TypeError(f"sizes must be whole numbers, not {given.dtype}; convert them first.")
    if given.shape != (count, 2) or not count or given.min() < 1 or given.max() > MAX_PIXELS:
        raise ValueError(f"sizes must be ({count}, 2) heights and widths in pixels, at least 1.")
    if np.prod(given, axis=1, dtype=np.int64).max() > MAX_PIXELS:
        raise ValueError(f"sizes must be of no more than {MAX_PIXELS} pixels; leave larger images out.")
    return given.astype(np.int32)


def _look(source: Source, count: int, progress: bool) -> list[tuple[int, int, str]]:
    """(height, width, reason) of every image."""

    def look(start: int) -> list[tuple[int, int, str]]:
        return _look_at(source, np.arange(start, min(start + _CHUNK, count)))

    found: list[tuple[int, int, str]] = []
    with ThreadPoolExecutor(_THREADS) as threads, scan_bar(count, " images", progress) as bar:
        for part in threads.map(look, range(0, count, _CHUNK)):
            found += part
            bar.update(len(part))
    return found


def _look_at(source: Source, rows: NDArray[np.int64]) -> list[tuple[int, int, str]]:
    return [
        (0, 0, one) if isinstance(one, str) else inspect(io.BytesIO(one.data), len(one))
        for one in read_each(source, rows)
    ]
