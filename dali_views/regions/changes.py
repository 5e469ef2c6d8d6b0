"""Rows that were written over columns which stay as they are, in memory in proportion to their number."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .columns import Columns, pack
from .rows import Array

__all__ = ["Changes"]

_FEWEST = 1 << 16  # rows that are noted before they are sorted in


class _Write(NamedTuple):
    rows: NDArray[np.int64]
    values: Columns
    epoch: int


class Changes:
    """Writes are noted, and sorted in when there are as many of them as rows sorted before.

    So a write takes the time of its own rows, a sort now and then aside, and a row that is written again and
    again does not take more memory each time.

    Args:
        columns: what the rows are before the changes.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._sorted = pack(columns, np.zeros(0, np.int64))
        self._noted: list[_Write] = []
        self._count = 0  # rows noted

    def __len__(self) -> int:
        """Number of rows written; one that was written again may count more than once."""
        return len(self._sorted) + self._count

    def add(self, rows: NDArray[np.int64], values: Columns, epoch: int) -> None:
        """Give rows (B,) their values in some columns; the arrays are kept."""
        self._noted.append(_Write(rows, values, epoch))
        self._count += len(rows)
        if self._count > max(_FEWEST, len(self._sorted)):
            self._sort()

    def rows(self) -> Array:
        """All changed rows, whole, in order of their numbers; see `columns.row_type`."""
        if self._noted:
            self._sort()
        return self._sorted

    def _sort(self) -> None:
        changed = np.unique(np.concatenate([self._sorted["row"], *(write.rows for write in self._noted)]))
        packed = pack(self._columns, changed)
        packed[np.searchsorted(changed, self._sorted["row"])] = self._sorted
        for write in self._noted:
            at = np.searchsorted(changed, write.rows)
            for name, values in write.values.items():
                # NumPy assigns repeated indices in order: the last one stays.
                packed[name][at] = values
            packed["added"][at] += 1
            packed["written_epoch"][at] = write.epoch
        self._sorted, self._noted, self._count = packed, [], 0
