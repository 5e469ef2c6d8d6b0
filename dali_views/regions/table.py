"""RegionTable: what the model has said about each sample (boxes, weights, partner)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..system.archive import open_npz
from ..system.collective import failing_together, world
from ..system.files import PathLike, atomic_write
from .columns import COLUMNS, new_columns
from .private import PrivateRows
from .queue import UpdateQueue, on_gpu
from .rows import check_boxes, check_index, check_partner, check_weights
from .shared import SharedRows
from .snapshot import Regions, checked_columns, checked_counts, checked_epoch, entry, read_only
from .sync import Traffic

__all__ = ["RegionTable", "Regions"]


class RegionTable:
    """One row per sample: K boxes, K weights and a partner sample, written by a model in training.

    Its arrays can only be read; write through ``update``. They take memory as they are written: at first
    none but for the partners, and a snapshot shares them until then.

    Args:
        length: N, number of samples.
        regions: K, boxes and weights per sample.
        fingerprint: of the data set the rows belong to, "" while unbound.
        shared: the ranks of a machine hold one copy of the table together. What is written is then seen
            after the next ``sync``, by the rank that wrote it, too. Made, loaded (``load_state_dict``) and
            synchronised on all ranks at once, as collective calls on the default process group. Without
            one, or in a world of one, it makes no difference.

    Attributes:
        epoch: the epoch that writes are booked under.
        regions: K, as above.
        fingerprint: as above.
        traffic: rows, bytes and seconds that `sync` has taken so far; whoever reads it may start it anew.

    Raises:
        ValueError: length or regions that cannot be; on every rank, if ranks share tables that differ.
    """

    def __init__(self, length: int, regions: int = 1, fingerprint: str = "", *, shared: bool = False) -> None:
        if length < 0 or regions < 1:
            raise ValueError(
                f"A table of {length} rows of {regions} regions cannot be; give length >= 0 and regions >= 1."
            )
        self.regions = regions
        self.fingerprint = fingerprint
        self.epoch = 0
        self.traffic = Traffic()
        columns = new_columns(length, regions)
        self._shared = shared and world() > 1
        self._rows = SharedRows(columns, fingerprint) if self._shared else PrivateRows(columns)
        self._queue = UpdateQueue()

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

    def _column(self, name: str) -> NDArray[Any]:
        self._settle(wait=True)
        return read_only(self._rows.columns[name])

    def __len__(self) -> int:
        return len(self._rows.columns["partner"])

    def __repr__(self) -> str:
        written = int(np.count_nonzero(self.writes))
        return f"RegionTable({len(self)} rows, regions={self.regions}, {written} written, epoch={self.epoch})"

    def update(self, index: Any, boxes: Any = None, weights: Any = None, partner: Any = None) -> None:
        """Write rows; all of the call or, if anything is wrong with it, nothing.

        Arguments are NumPy arrays, sequences or torch tensors on any device and of any float type.
        A sample that occurs more than once in a call gets its last values and counts as one write. What is
        written is seen at once, in a table that ranks share after the next ``sync``.

        Tensors on a GPU are copied without waiting for them: the call returns at once, and is checked and
        written when its values have arrived, in the order of the calls, at the latest when the table is next
        read, saved, synchronised or frozen. What is wrong with such a call is raised there.

        Args:
            index: integers (B,), rows in any order.
            boxes: (B, K, 4), or (B, 4), which is written to each of the K regions; values up to 1e-6
                outside [0, 1] are clipped.
            weights: (B, K), or (B,), which is written to each of the K regions.
            partner: integers (B,), rows of this table.

        Raises:
            ValueError: shapes that do not fit, rows out of range, NaN or infinity, a box outside [0, 1],
                inverted or empty, a negative weight, or (K > 1) a row whose weights are all zero.
            TypeError: values that are not numbers, or index or partner that are not integers.
        """
        given = {"index": index, "boxes": boxes, "weights": weights, "partner": partner}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) == 1:
            raise ValueError("update() was given nothing to write; pass boxes, weights or partner.")
        # Rows that a later call writes again must be written in order.
        self._settle(wait=not on_gpu(given))
        if on_gpu(given):
            self._queue.add(given, self.epoch)
        else:
            self._write(given, self.epoch)

    def _settle(self, wait: bool) -> None:
        """Write what has arrived from a GPU; if `wait`, all that is under way."""
        for update in self._queue.arrived(wait):
            self._write(update.values, update.epoch)

    def _write(self, given: Mapping[str, Any], epoch: int) -> None:
        rows = check_index(given["index"], len(self))
        new: dict[str, NDArray[Any]] = {}
        if "boxes" in given:
            new["boxes"] = check_boxes(given["boxes"], rows, self.regions)
            new["written"] = np.ones(len(rows), np.bool_)
        if "weights" in given:
            new["weights"] = check_weights(given["weights"], rows, self.regions)
        if "partner" in given:
            new["partner"] = check_partner(given["partner"], rows, len(self))
        self._rows.write(rows, new, epoch)

    def snapshot(self) -> Regions:
        """What boxes, weights, partner, written and epoch are now, read-only and for good; copies nothing."""
        self._settle(wait=True)
        return Regions(**self._rows.freeze(), epoch=self.epoch)

    def bind(self, fingerprint: str) -> None:
        """Tie the table to a data set.

        Raises:
            ValueError: it already belongs to another one.
        """
        self.fingerprint = _agreed("This RegionTable", self.fingerprint, fingerprint)

    def sync(self) -> int:
        """Make the tables of all ranks equal; only rows updated since the last sync travel.

        A collective call on the default process group. Of a row that several ranks updated, the whole
        row of the highest rank wins; ``writes`` adds up over the ranks. Without torch.distributed, or
        in a world of one, nothing moves.

        Returns:
            Number of rows received from other ranks.

        Raises:
            ValueError: on every rank, if the tables differ in length, regions or fingerprint.
        """
        self._settle(wait=True)
        return self._rows.sync(self.fingerprint, self.traffic)

    def check_equal(self) -> None:
        """Compare what `snapshot` freezes with the other ranks' tables; a collective call, of a few bytes.

        Raises:
            ValueError: on every rank, if the tables differ; the message names columns and ranks. Or if ranks
                share the table, and some wrote rows that no rank sees, for want of ``sync``.
        """
        self._settle(wait=True)
        self._rows.check_equal()

    def subset(self, rows: Any) -> RegionTable:
        """A table of some rows, for ``SampleIndex.subset`` of the same rows.

        It takes over boxes, weights and whether they were written; partners may lie outside and are not.

        Args:
            rows: (B,) row numbers, in the order wanted, or a mask of N truth values.

        Raises:
            IndexError: a row that the table does not have, or a mask of another length.
            ValueError: rows of another shape.
        """
        picks = np.asarray(rows)
        chosen = np.arange(len(self))[picks] if picks.size else np.zeros(0, np.int64)
        if chosen.ndim != 1:
            raise ValueError(f"rows has shape {picks.shape}; give row numbers (B,) or a mask ({len(self)},).")
        part = RegionTable(len(chosen), self.regions)
        taken = {name: self._column(name)[chosen] for name in ("boxes", "weights", "written")}
        part._rows.replace({**part._rows.columns, **taken})
        return part

    def state_dict(self) -> dict[str, Any]:
        """Plain dict of NumPy arrays (copies), an int and a str; ``sync`` first if there are other ranks."""
        return self._state() | {name: self._column(name).copy() for name in COLUMNS}

    def _state(self) -> dict[str, Any]:
        columns: dict[str, Any] = {name: self._column(name) for name in COLUMNS}
        return {**columns, "epoch": self.epoch, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a ``state_dict()``, all or nothing; arrays may be NumPy or torch.

        All rows count as synchronised: load the same state on every rank.

        Raises:
            ValueError: other fingerprint (where both have one), length or regions, or values not allowed.
            TypeError: a value is of another kind.
            RuntimeError: a rank that shares its table with this one could not load it.
        """
        with failing_together() if self._shared else nullcontext():
            self._settle(wait=True)
            stored = str(entry(state, "fingerprint"))
            fingerprint = _agreed("The stored RegionTable", stored, self.fingerprint)
            columns = checked_columns(state, len(self), self.regions) | checked_counts(state, len(self))
            epoch = checked_epoch(state)
        self._rows.replace(columns)
        self.epoch, self.fingerprint = epoch, fingerprint

    def save(self, path: PathLike) -> None:
        """Write the table as an .npz file without pickle; killed at any moment, the old file stays whole.

        One writer per file: with several ranks, save on one of them.
        """
        with atomic_write(path) as file:
            np.savez(file, **self._state())

    @classmethod
    def load(cls, path: PathLike, fingerprint: str = "") -> RegionTable:
        """Read a table written by ``save``; give the index's fingerprint to have it checked.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it was made for another data set, or is damaged.
        """
        with open_npz(path, "region table") as state:
            length, regions, _ = state["boxes"].shape
            table = cls(length, regions)
            table.load_state_dict(state)
        table.fingerprint = _agreed(f"The region table {path}", table.fingerprint, fingerprint)
        return table


def _agreed(what: str, own: str, other: str) -> str:
    """The one fingerprint of two, either of which may be empty."""
    if own and other and own != other:
        raise ValueError(
            f"{what} was made for another data set (fingerprint {own[:12]}, not {other[:12]}); "
            "use the index it was made with, or start a new table."
        )
    return own or other
