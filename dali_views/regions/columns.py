"""The columns of a region table: their names, what they hold at first, and their rows as they travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np

from .rows import Array

FROZEN = ("boxes", "weights", "partner", "written")
"""What a snapshot holds."""
COLUMNS = (*FROZEN, "writes", "written_epoch")

Columns: TypeAlias = "Mapping[str, Array]"
"""Arrays of N rows, under all names of `COLUMNS`."""

CHUNK = 1 << 17
"""Rows of whatever is done to a whole table piece by piece, so that it takes no second table's memory."""


def new_columns(length: int, regions: int) -> dict[str, Array]:
    """Columns that nobody has written: read-only and without memory of their own, but for `partner`."""
    defaults = {
        "boxes": np.broadcast_to(np.array([0, 0, 1, 1], np.float32), (length, regions, 4)),
        "weights": np.broadcast_to(np.float32(1), (length, regions)),
        "partner": np.arange(length, dtype=np.int64),
        "written": np.broadcast_to(np.False_, length),
        "writes": np.broadcast_to(np.int32(0), length),
        "written_epoch": np.broadcast_to(np.int32(-1), length),
    }
    return {name: np.asarray(defaults[name]) for name in COLUMNS}


def chunks(length: int) -> Iterator[slice]:
    """All rows, `CHUNK` at a time."""
    for start in range(0, length, CHUNK):
        yield slice(start, min(start + CHUNK, length))


def row_type(columns: Columns) -> np.dtype[np.void]:
    """A row as it travels: its number, how often it was written anew, and all columns.

    Its `writes` do not count what is in `added`.
    """
    layout = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
    return np.dtype([("row", np.int64), ("added", np.int32), *layout])


def pack(columns: Columns, rows: Array) -> Array:
    """Rows (B,) as they stand, in `row_type`, with nothing added."""
    packed = np.zeros(len(rows), row_type(columns))
    packed["row"] = rows
    for name, column in columns.items():
        packed[name] = column[rows]
    return packed


def differing(columns: Columns, news: Array) -> Iterator[str]:
    """Names of the columns in which packed rows are not what the columns hold: others need no copy."""
    for name in COLUMNS:
        if not np.array_equal(columns[name][news["row"]], news[name]):
            yield name
