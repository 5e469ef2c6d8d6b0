"""The rows of a region table that the ranks of a machine share, in versions that are never written."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack, closing

import numpy as np
from numpy.typing import NDArray

from ..system.collective import all_gather
from .changes import Changes
from .columns import FROZEN, Columns, differing
from .rows import Array
from .shared_pages import Draft, SharedPages
from .sync import Traffic, check_equal, exchange, refuse_different_tables

__all__ = ["SharedRows"]


class SharedRows:
    """As `PrivateRows`, but what is written is seen after the next `sync`.

    Of every column that a sync changes one rank of each machine makes a new copy, which the others map. The
    one before lasts for as long as a snapshot needs it. All calls but `write` and `freeze` are collective.

    Attributes:
        columns: as of the last sync, by name.
    """

    def __init__(self, columns: Columns, fingerprint: str) -> None:
        length, regions = columns["weights"].shape
        refuse_different_tables(length, regions, fingerprint)
        self._pages = SharedPages()
        # The other columns take no memory before they are written.
        self._publish(columns, ["partner"])

    def write(self, rows: NDArray[np.int64], values: Columns, epoch: int) -> None:
        """Give rows (B,) their values in some columns, with the next `sync`."""
        self._changes.add(rows, values, epoch)

    def freeze(self) -> dict[str, Array]:
        """The columns of a snapshot."""
        return {name: self.columns[name] for name in FROZEN}

    def replace(self, columns: Columns) -> None:
        """Hold other columns; what was written and not synchronised is dropped."""
        self._publish(columns, columns)

    def sync(self, fingerprint: str, traffic: Traffic) -> int:
        """See `RegionTable.sync`."""
        began, received = time.perf_counter(), traffic.rows
        mine = self._changes.rows()
        rounds = exchange(self.columns, mine["row"], mine.__getitem__, fingerprint, traffic)
        self._publish(self.columns, [], rounds)
        traffic.seconds += time.perf_counter() - began
        return traffic.rows - received

    def check_equal(self) -> None:
        """See `RegionTable.check_equal`."""
        waiting = np.concatenate(all_gather(np.array([len(self._changes)], np.int64)))
        if waiting.any():
            ranks = np.flatnonzero(waiting).tolist()
            raise ValueError(
                f"No rank sees what ranks {ranks} wrote into the RegionTable they share; call sync() after "
                "update()."
            )
        check_equal({name: self.columns[name] for name in FROZEN})

    def _publish(self, columns: Columns, names: Iterable[str], rounds: Iterable[Array] = ()) -> None:
        """Hold `columns`: `names` in shared pages, and so those that rounds of packed rows change."""
        newest, drafts = dict(columns), dict[str, Draft]()
        error: OSError | None = None
        with ExitStack() as open_drafts:

            def draft(name: str) -> Array:
                if name not in drafts:
                    drafts[name] = open_drafts.enter_context(closing(Draft(columns[name])))
                    newest[name] = drafts[name].array
                return newest[name]

            try:
                if self._pages.leads:
                    for name in names:
                        draft(name)
            except OSError as refused:
                error = refused
            for news in rounds:  # to the end, for the other ranks take part in each
                if not self._pages.leads or error is not None:
                    continue
                try:
                    for name in differing(newest, news):
                        draft(name)[news["row"]] = news[name]
                except OSError as refused:
                    error = refused
            self.columns = self._pages.publish(columns, drafts, error)
        self._changes = Changes(self.columns)
