"""RegionTable: what the model has said about each sample (boxes, weights, partner)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .archive import open_npz
from .atomic import PathLike, atomic_write
from .region_queue import UpdateQueue, on_gpu
from .region_rows import as_array, check_boxes, check_index, check_partner, check_weights
from .region_sync import Traffic, check_equal, exchange

__all__ = ["RegionTable", "Regions"]

_FROZEN = ("boxes", "weights", "partner", "written")
_COLUMNS = (*_FROZEN, "writes", "written_epoch")
_END = 2**31  # of the integers in `writes` and `written_epoch`


@dataclass(frozen=True, eq=False)
class Regions:
    """A frozen copy of a RegionTable, with the same shapes and dtypes.

    Its arrays are read-only, and later updates of the table do not reach it.
    """

    boxes: NDArray[np.float32]
    weights: NDArray[np.float32]
    partner: NDArray[np.int64]
    written: NDArray[np.bool_]
    epoch: int

    def __post_init__(self) -> None:
        for name in _FROZEN:
            array = getattr(self, name).copy()
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.partner)

    def state_dict(self) -> dict[str, Any]:
        """Plain dict of NumPy arrays (copies) and an int, for a checkpoint."""
        columns: dict[str, Any] = {name: getattr(self, name).copy() for name in _FROZEN}
        return {**columns, "epoch": self.epoch}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Regions:
        """Rebuild from ``state_dict()``; arrays may be NumPy or torch.

        Raises:
            ValueError: a key is missing, shapes do not agree, or a value is not allowed in a table.
            TypeError: a value is of another kind.
        """
        shape = as_array(_entry(state, "boxes"), "boxes", "iuf").shape
        if len(shape) != 3:
            raise ValueError(
                f"The stored boxes have shape {shape}, not (N, K, 4); the state is not of Regions."
            )
        return _checked(state, shape[0], shape[1])


class RegionTable:
    """One row per sample: K boxes, K weights and a partner sample, written by a model in training.

    Attributes:
        epoch: the epoch that writes are booked under.
        regions: K.
        fingerprint: of the data set the rows belong to, "" while unbound.
        traffic: rows, bytes and seconds that `sync` has taken so far; whoever reads it may start it anew.

    Write through ``update``: what is written into the arrays directly is neither checked nor synchronised.
    """

    def __init__(self, length: int, regions: int = 1, fingerprint: str = "") -> None:
        if length < 0 or regions < 1:
            raise ValueError(
                f"A table of {length} rows of {regions} regions cannot be; give length >= 0 and regions >= 1."
            )
        self.regions = regions
        self.fingerprint = fingerprint
        self.epoch = 0
        self.traffic = Traffic()
        self._columns: dict[str, NDArray[Any]] = {
            "boxes": np.tile(np.array([0, 0, 1, 1], np.float32), (length, regions, 1)),
            "weights": np.ones((length, regions), np.float32),
            "partner": np.arange(length, dtype=np.int64),
            "written": np.zeros(length, np.bool_),
            "writes": np.zeros(length, np.int32),
            "written_epoch": np.full(length, -1, np.int32),
        }
        self._unsynced: NDArray[np.int32] = np.zeros(length, np.int32)  # writes since the last sync
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
        return self._columns[name]

    def __len__(self) -> int:
        return len(self._unsynced)

    def __repr__(self) -> str:
        written = int(np.count_nonzero(self.writes))
        return f"RegionTable({len(self)} rows, regions={self.regions}, {written} written, epoch={self.epoch})"

    def update(self, index: Any, boxes: Any = None, weights: Any = None, partner: Any = None) -> None:
        """Write rows; all of the call or, if anything is wrong with it, nothing.

        Arguments are NumPy arrays, sequences or torch tensors on any device and of any float type.
        A sample that occurs more than once in a call gets its last values and counts as one write.

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
        for name, values in new.items():
            # NumPy assigns repeated indices in order: the last one stays.
            self._columns[name][rows] = values
        self._columns["writes"][rows] += 1
        self._unsynced[rows] += 1
        self._columns["written_epoch"][rows] = epoch

    def snapshot(self) -> Regions:
        """Frozen, read-only copy of boxes, weights, partner, written and epoch."""
        return Regions(self.boxes, self.weights, self.partner, self.written, self.epoch)

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
        columns = {name: getattr(self, name) for name in (*_FROZEN, "written_epoch")}
        return exchange(columns, self.writes, self._unsynced, self.fingerprint, self.traffic)

    def check_equal(self) -> None:
        """Compare what `snapshot` freezes with the other ranks' tables; a collective call, of a few bytes.

        Raises:
            ValueError: on every rank, if the tables differ; the message names columns and ranks.
        """
        check_equal({name: getattr(self, name) for name in _FROZEN})

    def subset(self, rows: Any) -> RegionTable:
        """A table of some rows (B,), in the order given, for ``SampleIndex.subset`` of the same rows.

        It takes over boxes, weights and whether they were written; partners may lie outside and are not.
        """
        part = RegionTable(len(rows), self.regions)
        part.boxes[:], part.weights[:], part.written[:] = (
            self.boxes[rows],
            self.weights[rows],
            self.written[rows],
        )
        return part

    def state_dict(self) -> dict[str, Any]:
        """Plain dict of NumPy arrays (copies), an int and a str; ``sync`` first if there are other ranks."""
        columns: dict[str, Any] = {name: getattr(self, name).copy() for name in _COLUMNS}
        return {**columns, "epoch": self.epoch, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a ``state_dict()``, all or nothing; arrays may be NumPy or torch.

        All rows count as synchronised: load the same state on every rank.

        Raises:
            ValueError: other fingerprint (where both have one), length or regions, or values not allowed.
            TypeError: a value is of another kind.
        """
        stored = str(_entry(state, "fingerprint"))
        fingerprint = _agreed("The stored RegionTable", stored, self.fingerprint)
        new = _checked(state, len(self), self.regions)
        counts = {name: as_array(_entry(state, name), name, "iu") for name in ("writes", "written_epoch")}
        for name, column in counts.items():
            if column.shape != (len(self),) or not ((column >= -1) & (column < _END)).all():
                raise ValueError(
                    f"The stored {name} do not have {len(self)} rows of counts; the state is damaged."
                )
        for name in _FROZEN:
            getattr(self, name)[:] = getattr(new, name)
        self.writes[:], self.written_epoch[:] = counts["writes"], counts["written_epoch"]
        self._unsynced[:] = 0
        self.epoch = new.epoch
        self.fingerprint = fingerprint

    def save(self, path: PathLike) -> None:
        """Write the table as an .npz file without pickle; killed at any moment, the old file stays whole.

        One writer per file: with several ranks, save on one of them.
        """
        with atomic_write(path) as file:
            np.savez(file, **self.state_dict())

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


def _entry(state: Mapping[str, Any], name: str) -> Any:
    if name not in state:
        raise ValueError(f"The state has no '{name}'; pass what state_dict() returned.")
    return state[name]


def _checked(state: Mapping[str, Any], length: int, regions: int) -> Regions:
    """The frozen part of a state, every row checked."""
    kinds = {"boxes": "iuf", "weights": "iuf", "partner": "iu", "written": "b"}
    columns = {name: as_array(_entry(state, name), name, kinds[name]) for name in _FROZEN}
    shapes = [column.shape for column in columns.values()]
    if shapes != [(length, regions, 4), (length, regions), (length,), (length,)]:
        raise ValueError(
            f"The stored shapes {shapes} do not fit {length} rows of {regions} regions; use the index and "
            "the number of regions they were made with."
        )
    epoch = as_array(_entry(state, "epoch"), "epoch", "iu")
    if epoch.shape or not -_END <= epoch < _END:
        raise ValueError(f"The stored epoch {epoch} is no number of an epoch; the state is damaged.")
    rows = np.arange(length)
    return Regions(
        check_boxes(columns["boxes"], rows, regions),
        check_weights(columns["weights"], rows, regions),
        check_partner(columns["partner"], rows, length),
        columns["written"],
        int(epoch),
    )
