"""RegionTable: what the model has said about each sample (boxes, weights, partner)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..system import stored
from ..system.files import PathLike, load_arrays, save_arrays
from ..system.ranks import world
from .queue import UpdateQueue
from .rows import COLUMNS, FROZEN, Array, check, check_index, new_columns
from .snapshot import REMEDY, Snapshot, agreed, columns_form, read_only
from .sync import Traffic, check_equal, exchange

P = ParamSpec("P")
R = TypeVar("R")


def _in_turn(method: Callable[Concatenate[RegionTable, P], R]) -> Callable[Concatenate[RegionTable, P], R]:
    """A method that runs as a whole: calls of other threads wait for its end."""

    @wraps(method)
    def whole(self: RegionTable, /, *args: P.args, **options: P.kwargs) -> R:
        with self._lock:
            return method(self, *args, **options)

    return whole


class RegionTable:
    """One row per sample: K boxes, K weights and a partner sample, written by a model in training.

    Arrays are read-only; write through ``update``. A column takes memory once it is written (`partner` from
    the start); a snapshot shares it until the next write. Each rank has its own table; ``sync`` makes them
    equal.

    Any thread may call any method. One call runs after the other: a snapshot, a state, a file or a subset
    has all rows and columns of an ``update`` or none of them; an ``update`` waits while ``sync`` runs. An
    array that was read before shows later writes, maybe half of one. Read columns that must be consistent
    from a snapshot. With several ranks, no thread may update between ``sync`` and ``set_epoch``.

    Args:
        length: N, number of samples; regions: K, boxes and weights per sample.
        fingerprint: identifies the data set that the rows belong to, "" while unbound.

    Attributes:
        epoch: the epoch that new writes are recorded under.
        traffic: what `sync` received so far; a reader may replace it to start at zero.
    """

    def __init__(self, length: int, regions: int = 1, fingerprint: str = "") -> None:
        if length < 0 or regions < 1:
            raise ValueError(
                f"{length} rows of {regions} regions are no table; give length >= 0 and regions >= 1."
            )
        self.regions = regions
        self.fingerprint = fingerprint
        self.epoch = 0
        self.traffic = Traffic()
        self._lock = threading.RLock()  # `snapshot` would otherwise freeze rows that a thread is writing
        self._queue = UpdateQueue()
        self._replace(new_columns(length, regions))

    @_in_turn
    def __getstate__(self) -> dict[str, Any]:
        """For copies, which are tables of their own, and for other processes."""
        self._settle(wait=True)
        for column in self._columns.values():
            column.flags.writeable = False  # both tables copy a column before they write to it
        own = {"_columns": self._columns.copy(), "_unsynced": self._unsynced.copy(), "traffic": Traffic()}
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_queue")} | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock(), _queue=UpdateQueue())

    def _replace(self, columns: dict[str, Array]) -> None:
        """Hold other columns; all rows count as synchronised."""
        self._columns = columns
        self._unsynced = np.zeros(len(columns["partner"]), np.int32)  # writes that other ranks do not know

    @property
    def boxes(self) -> NDArray[np.float32]:
        """float32 (N, K, 4), (y0, x0, y1, x1) as fractions of the image; at first the whole image."""
        return self._column("boxes")

    @property
    def weights(self) -> NDArray[np.float32]:
        """float32 (N, K), >= 0; at first 1. With K > 1 a region is drawn in proportion to its weight."""
        return self._column("weights")

    @property
    def partner(self) -> NDArray[np.int64]:
        """int64 (N,), the sample that partner views are cut from; at first the sample itself."""
        return self._column("partner")

    @property
    def written(self) -> NDArray[np.bool_]:
        """bool (N,), whether a call of ``update`` ever gave the row boxes."""
        return self._column("written")

    @property
    def writes(self) -> NDArray[np.int32]:
        """int32 (N,), how many calls of ``update`` wrote the row."""
        return self._column("writes")

    @property
    def written_epoch(self) -> NDArray[np.int32]:
        """int32 (N,), epoch of the last write, -1 for never."""
        return self._column("written_epoch")

    @_in_turn
    def _column(self, name: str) -> NDArray[Any]:
        self._settle(wait=True)
        return read_only(self._columns[name])

    def __len__(self) -> int:
        return len(self._unsynced)

    def __repr__(self) -> str:
        written = int(np.count_nonzero(self.writes))
        return f"RegionTable({len(self)} rows, regions={self.regions}, {written} written, epoch={self.epoch})"

    @_in_turn
    def update(self, index: Any, boxes: Any = None, weights: Any = None, partner: Any = None) -> None:
        """Write rows: all of the call or, if anything is wrong with it, nothing.

        Arguments are NumPy arrays, sequences or torch tensors on any device and of any float type. A sample
        that occurs more than once in a call gets its last values and counts as one write.

        Tensors on a GPU are copied asynchronously: the call returns at once. They are checked and written in
        the order of the calls, at the latest when the table is next read, and raise their errors there.

        Args:
            index: integers (B,), rows in any order.
            boxes: (B, K, 4), or (B, 4) for all K regions; values up to 1e-6 outside [0, 1] are clipped.
            weights: (B, K), or (B,) for all K regions. In every epoch one region of a sample is drawn in
                proportion to its weight; `Batch.weights` has its weight, for the loss of the sample.
            partner: integers (B,), rows of this table: the image that views with `View.partner` are cut from.

        Raises:
            ValueError, TypeError: shapes, types or values that a table does not hold, see `rows.check`.
        """
        given = {"index": index, "boxes": boxes, "weights": weights, "partner": partner}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) == 1:
            raise ValueError("update() was given nothing to write; pass boxes, weights or partner.")
        on_gpu = any(getattr(value, "is_cuda", False) for value in given.values())
        # Earlier calls must be written first: this one may write the same rows.
        self._settle(wait=not on_gpu)
        if on_gpu:
            self._queue.add(given, self.epoch)
        else:
            self._write(given, self.epoch)

    def _settle(self, wait: bool) -> None:
        """Write what has arrived from a GPU; if `wait`, everything that is on its way."""
        for values, epoch in self._queue.arrived(wait):
            self._write(values, epoch)

    def _write(self, given: Mapping[str, Any], epoch: int) -> None:
        rows = check_index(given["index"], len(self))
        values = {name: value for name, value in given.items() if name != "index"}
        new = {name: check(name, value, rows, len(self), self.regions) for name, value in values.items()}
        if "boxes" in new:
            new["written"] = np.ones(len(rows), np.bool_)
        for name, column in new.items():
            self._own(name)[rows] = column  # NumPy assigns repeated rows in order: the last value stays
        self._own("writes")[rows] += 1
        self._own("written_epoch")[rows] = epoch
        self._unsynced[rows] += 1

    def _own(self, name: str) -> Array:
        """A column that may be written; one that a snapshot shares is copied first."""
        if not self._columns[name].flags.writeable:
            self._columns[name] = self._columns[name].copy()
        return self._columns[name]

    @_in_turn
    def snapshot(self) -> Snapshot:
        """Boxes, weights, partner, written and epoch as they are now, read-only; copies nothing."""
        self._settle(wait=True)
        for name in FROZEN:
            self._columns[name].flags.writeable = False
        return Snapshot(**{name: self._columns[name] for name in FROZEN}, epoch=self.epoch)

    @_in_turn
    def subset(self, rows: Any) -> RegionTable:
        """Boxes, weights and `written` of some rows, as a table for ``SampleIndex.subset`` of the same rows.

        Args:
            rows: (B,) row numbers, in the order wanted, or a mask of N truth values.

        Raises:
            IndexError, ValueError: rows that the table does not have, or of another shape.
        """
        picks = np.asarray(rows)
        chosen = np.arange(len(self))[picks] if picks.size else np.zeros(0, np.int64)
        if chosen.ndim != 1:
            raise ValueError(f"rows has shape {picks.shape}; give row numbers (B,) or a mask ({len(self)},).")
        part = RegionTable(len(chosen), self.regions)
        part._columns |= {name: self._column(name)[chosen] for name in ("boxes", "weights", "written")}
        return part

    @_in_turn
    def sync(self) -> int:
        """Make the tables of all ranks equal: a collective call that sends the rows updated since the last.

        If several ranks updated a row, the whole row of the highest rank wins; ``writes`` is summed.

        Returns:
            Number of rows received from other ranks; 0 without torch.distributed.

        Raises:
            ValueError: on every rank, if the tables differ in length, regions or fingerprint.
        """
        self._settle(wait=True)
        if world() == 1:
            self._replace(self._columns)
            return 0
        began, before = time.perf_counter(), self.traffic.rows
        for news in exchange(self._columns, self._unsynced, self.fingerprint, self.traffic):
            rows = news["row"]
            for name in COLUMNS:
                if not np.array_equal(self._columns[name][rows], news[name]):  # an equal column needs no copy
                    self._own(name)[rows] = news[name]
            self._unsynced[rows] = 0
        self.traffic.seconds += time.perf_counter() - began
        return self.traffic.rows - before

    @_in_turn
    def check_equal(self) -> None:
        """Compare what `snapshot` freezes with the other ranks' tables; a collective call of a few bytes.

        Raises:
            ValueError: on every rank, if the tables differ.
        """
        self._settle(wait=True)
        check_equal({name: self._columns[name] for name in FROZEN})

    @_in_turn
    def bind(self, fingerprint: str) -> None:
        """Tie the table to a data set; ValueError if it belongs to another one."""
        self.fingerprint = agreed("This RegionTable", self.fingerprint, fingerprint)

    @_in_turn
    def state_dict(self) -> dict[str, Any]:
        """Plain dict of NumPy arrays (copies), an int and a str; ``sync`` first if there are other ranks."""
        columns: dict[str, Any] = {name: self._column(name).copy() for name in COLUMNS}
        return {**columns, "epoch": self.epoch, "fingerprint": self.fingerprint}

    @_in_turn
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a ``state_dict()``, the same one on every rank; arrays may be NumPy or torch.

        Raises:
            ValueError: the state does not fit this table or is damaged; nothing was changed.
        """
        self._settle(wait=True)
        found = stored.check(state, self.form(), "The state of the region table", REMEDY)
        self.epoch, self.fingerprint = found["epoch"], found["fingerprint"]
        self._replace({name: found[name] for name in COLUMNS})

    def form(self) -> stored.Form:
        """What ``load_state_dict`` takes, to check it as a part of a larger state."""

        def form(state: Any, place: str) -> dict[str, Any]:
            own = stored.entries({"fingerprint": stored.text})(state, place)["fingerprint"]
            if not own.isprintable():
                raise stored.unfit(f"{place}.fingerprint".lstrip("."), own, "text that can be printed")
            fingerprint = agreed("The stored RegionTable", own, self.fingerprint)
            columns = columns_form(COLUMNS, len(self), self.regions)(state, place)
            return {**columns, "fingerprint": fingerprint}

        return form

    @_in_turn
    def save(self, path: PathLike) -> None:
        """Write a safetensors file in one step. With several ranks, save on one of them."""
        columns = {name: self._column(name) for name in COLUMNS}
        save_arrays(path, columns, {"epoch": self.epoch, "fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: PathLike, fingerprint: str = "") -> RegionTable:
        """Read what ``save`` wrote; a ValueError if it is damaged or has another fingerprint than given."""
        with load_arrays(path, "region table") as (columns, facts):
            (length,) = columns["partner"].shape  # whose numbers are in the file
            regions = columns["boxes"].shape[1]
            if columns["boxes"].shape != (length, regions, 4):
                raise ValueError(f"its boxes have the shape {columns['boxes'].shape} for {length} partners")
            table = cls(length, regions)
            table.load_state_dict({**columns, **facts})
        table.fingerprint = agreed(f"The region table {path}", table.fingerprint, fingerprint)
        return table
