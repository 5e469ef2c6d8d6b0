"""The rows of a region table in the memory of this process, shared with snapshots until they are written."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from ..system.collective import world
from .columns import COLUMNS, FROZEN, Columns, differing, pack
from .rows import Array
from .sync import Traffic, check_equal, exchange

__all__ = ["PrivateRows"]


class PrivateRows:
    """Columns that are written in place; one that is read-only is somebody else's, too, and copied first.

    Attributes:
        columns: as of now, by name.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns = dict(columns)
        self._unsynced = self._none_unsynced()

    def write(self, rows: NDArray[np.int64], values: Columns, epoch: int) -> None:
        """Give rows (B,) their values in some columns."""
        for name, column in values.items():
            # NumPy assigns repeated indices in order: the last one stays.
            self._own(name)[rows] = column
        self._own("writes")[rows] += 1
        self._own("written_epoch")[rows] = epoch
        self._unsynced[rows] += 1

    def freeze(self) -> dict[str, Array]:
        """The columns of a snapshot, which will never be written again."""
        for name in FROZEN:
            self.columns[name].flags.writeable = False
        return {name: self.columns[name] for name in FROZEN}

    def replace(self, columns: Columns) -> None:
        """Hold other columns, which count as synchronised."""
        self.columns = dict(columns)
        self._unsynced = self._none_unsynced()

    def sync(self, fingerprint: str, traffic: Traffic) -> int:
        """See `RegionTable.sync`."""
        if world() == 1:
            self._unsynced = self._none_unsynced()
            return 0
        began = time.perf_counter()
        changed = np.flatnonzero(self._unsynced)

        def packed(part: slice) -> Array:
            rows = changed[part]
            mine = pack(self.columns, rows)
            mine["added"] = self._unsynced[rows]
            mine["writes"] -= mine["added"]
            return mine

        received = traffic.rows
        for news in exchange(self.columns, changed, packed, fingerprint, traffic):
            for name in differing(self.columns, news):
                self._own(name)[news["row"]] = news[name]
            self._unsynced[news["row"]] = 0
        traffic.seconds += time.perf_counter() - began
        return traffic.rows - received

    def check_equal(self) -> None:
        """See `RegionTable.check_equal`."""
        check_equal({name: self.columns[name] for name in FROZEN})

    def _own(self, name: str) -> Array:
        """A column that may be written."""
        if not self.columns[name].flags.writeable:
            self.columns[name] = self.columns[name].copy()
        return self.columns[name]

    def _none_unsynced(self) -> NDArray[np.int32]:
        """(N,) writes that the other ranks do not know of: none. Takes memory where it is written only."""
        return np.zeros(len(self.columns[COLUMNS[0]]), np.int32)
