"""RegionTable: what the model has said about each sample (boxes, weights, partner)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_TOLERANCE = 1e-6  # rounding of a box computed in float32 elsewhere
_SYNC_ROWS = 1 << 17  # rows of the table covered by one exchange; bounds the memory of sync()
# All that numpy and zipfile were seen to raise when bytes of a file were flipped or cut off.
_DAMAGE = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    EOFError,
    OSError,
    RuntimeError,
    BadZipFile,
    zlib.error,
)
_FROZEN = ("boxes", "weights", "partner", "written")
_COLUMNS = (*_FROZEN, "writes", "written_epoch")


@dataclass(frozen=True, eq=False)
class Regions:
    """A frozen copy of a RegionTable; later updates of the table do not reach it.

    Attributes:
        boxes: float32 (N, K, 4), (y0, x0, y1, x1) as fractions of the image, read-only.
        weights: float32 (N, K), read-only.
        partner: int64 (N,), read-only.
        written: bool (N,), whether the row's boxes were ever written, read-only.
        epoch: the table's epoch when the copy was made.
    """

    boxes: NDArray[np.float32]
    weights: NDArray[np.float32]
    partner: NDArray[np.int64]
    written: NDArray[np.bool_]
    epoch: int

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
        """
        boxes = _as_array(_column(state, "boxes"), "boxes")
        if boxes.ndim != 3:
            raise ValueError(
                f"The stored boxes have shape {boxes.shape}, not (N, K, 4); the state is not of Regions."
            )
        return _checked_columns(state, boxes.shape[0], boxes.shape[1])


class RegionTable:
    """One row per sample: K boxes, K weights and a partner sample, written by a model in training.

    Attributes:
        boxes: float32 (N, K, 4), (y0, x0, y1, x1) as fractions of the image; at first the whole image.
        weights: float32 (N, K), >= 0; at first 1. With K > 1 a region is drawn in proportion to its weight.
        partner: int64 (N,), the sample that partner views are cut from; at first the sample itself.
        written: bool (N,), whether a call of ``update`` ever gave the row boxes.
        writes: int32 (N,), how many calls of ``update`` wrote the row.
        written_epoch: int32 (N,), epoch of the last write, -1 for never.
        epoch: the epoch that writes are booked under.
        regions: K.
        fingerprint: of the data set the rows belong to, "" while unbound.

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
        self.boxes: NDArray[np.float32] = np.tile(np.array([0, 0, 1, 1], np.float32), (length, regions, 1))
        self.weights: NDArray[np.float32] = np.ones((length, regions), np.float32)
        self.partner: NDArray[np.int64] = np.arange(length, dtype=np.int64)
        self.written: NDArray[np.bool_] = np.zeros(length, np.bool_)
        self.writes: NDArray[np.int32] = np.zeros(length, np.int32)
        self.written_epoch: NDArray[np.int32] = np.full(length, -1, np.int32)
        self._unsynced: NDArray[np.int32] = np.zeros(length, np.int32)  # writes since the last sync

    def __len__(self) -> int:
        return len(self.partner)

    def __repr__(self) -> str:
        written = int(np.count_nonzero(self.writes))
        return f"RegionTable({len(self)} rows, regions={self.regions}, {written} written, epoch={self.epoch})"

    def update(self, index: Any, boxes: Any = None, weights: Any = None, partner: Any = None) -> None:
        """Write rows; all of the call or, if anything is wrong with it, nothing.

        Arguments are NumPy arrays, sequences or torch tensors on any device and of any float type.
        A sample that occurs more than once in a call gets its last values and counts as one write.

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
        rows = _as_rows(index, "index")
        if rows.ndim != 1:
            raise ValueError(f"index has shape {rows.shape}; give one row number per sample, shape (B,).")
        if boxes is None and weights is None and partner is None:
            raise ValueError("update() was given nothing to write; pass boxes, weights or partner.")
        _refuse((rows < 0) | (rows >= len(self)), rows, lambda i: f"is not in the table of {len(self)} rows")

        new_boxes = new_weights = new_partner = None
        if boxes is not None:
            new_boxes = _check_boxes(
                _per_region(_as_floats(boxes, "boxes"), "boxes", rows, self.regions, (4,)), rows
            )
        if weights is not None:
            new_weights = _check_weights(
                _per_region(_as_floats(weights, "weights"), "weights", rows, self.regions), rows
            )
        if partner is not None:
            new_partner = _check_partner(_as_rows(partner, "partner"), rows, len(self))

        # NumPy assigns repeated indices in order, so the last one stays.
        if new_boxes is not None:
            self.boxes[rows] = new_boxes
            self.written[rows] = True
        if new_weights is not None:
            self.weights[rows] = new_weights
        if new_partner is not None:
            self.partner[rows] = new_partner
        self.writes[rows] += 1
        self._unsynced[rows] += 1
        self.written_epoch[rows] = self.epoch

    def snapshot(self) -> Regions:
        """Frozen, read-only copy of boxes, weights, partner, written and epoch."""
        return _freeze(self.boxes, self.weights, self.partner, self.written, self.epoch)

    def bind(self, fingerprint: str) -> None:
        """Tie the table to a data set.

        Raises:
            ValueError: it already belongs to another one.
        """
        _same_data_set("This RegionTable", self.fingerprint, fingerprint)
        self.fingerprint = self.fingerprint or fingerprint

    def sync(self) -> int:
        """Make the tables of all ranks equal; only rows updated since the last sync travel.

        A collective call on the default process group. Of a row that several ranks updated, the whole
        row of the highest rank wins; ``writes`` adds up over the ranks. Without torch.distributed, or
        in a world of one, only the marks are cleared.

        Returns:
            Number of rows received from other ranks.

        Raises:
            ValueError: on every rank, if the tables differ in length, regions or fingerprint.
        """
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            self._unsynced[:] = 0
            return 0
        digest = int.from_bytes(hashlib.sha256(self.fingerprint.encode()).digest()[:7], "big")
        tables = np.stack(_all_gather(np.array([len(self), self.regions, digest], np.int64)))
        if (tables != tables[0]).any():
            raise ValueError(
                f"The ranks hold different RegionTables ((rows, regions) per rank: {tables[:, :2].tolist()}, "
                f"{len(set(tables[:, 2].tolist()))} fingerprint(s)); build all of them from the same index."
            )
        # Rounds are ranges of row numbers, so every conflict is settled within one round.
        rows = np.flatnonzero(self._unsynced)
        cuts = np.searchsorted(rows, np.arange(0, len(self) + _SYNC_ROWS, _SYNC_ROWS))
        counts = np.stack(_all_gather(np.diff(cuts).astype(np.int64)))
        for part, count in enumerate(counts.T):
            if count.any():
                packed = self._pack(rows[cuts[part] : cuts[part + 1]], int(count.max()))
                everyone = _all_gather(packed.view(np.uint8))
                # In rank order: where a row repeats, the highest rank's is assigned last.
                self._unpack(
                    np.concatenate([e.view(packed.dtype)[:n] for e, n in zip(everyone, count, strict=True)])
                )
        return int(counts.sum() - counts[dist.get_rank()].sum())

    def _pack(self, rows: NDArray[np.int64], padded: int) -> Array:
        layout = [
            ("row", np.int64),
            ("boxes", np.float32, (self.regions, 4)),
            ("weights", np.float32, (self.regions,)),
            ("partner", np.int64),
            ("written", np.bool_),
            ("written_epoch", np.int32),
            ("base", np.int32),
            ("added", np.int32),
        ]
        packed = np.zeros(padded, np.dtype(layout))
        filled = packed[: len(rows)]
        filled["row"] = rows
        for name in (*_FROZEN, "written_epoch"):
            filled[name] = getattr(self, name)[rows]
        filled["base"] = self.writes[rows] - self._unsynced[rows]
        filled["added"] = self._unsynced[rows]
        return packed

    def _unpack(self, packed: Array) -> None:
        rows = packed["row"]
        for name in (*_FROZEN, "written_epoch"):
            getattr(self, name)[rows] = packed[name]
        self.writes[rows] = packed["base"]
        np.add.at(self.writes, rows, packed["added"])
        self._unsynced[rows] = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain dict of NumPy arrays (copies), an int and a str; ``sync`` first if there are other ranks."""
        columns: dict[str, Any] = {name: getattr(self, name).copy() for name in _COLUMNS}
        return {**columns, "epoch": self.epoch, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a ``state_dict()``, all or nothing; arrays may be NumPy or torch.

        All rows count as synchronised: load the same state on every rank.

        Raises:
            ValueError: other fingerprint (where both have one), length or regions, or values not allowed.
        """
        stored = str(_column(state, "fingerprint"))
        _same_data_set("The stored RegionTable", stored, self.fingerprint)
        length, regions = self.weights.shape
        new = _checked_columns(state, length, regions)
        writes, written_epoch = (_as_rows(_column(state, name), name) for name in ("writes", "written_epoch"))
        if writes.shape != (length,) or written_epoch.shape != (length,):
            raise ValueError(
                f"The stored writes or written_epoch do not have {length} rows; the state is damaged."
            )
        for name in _FROZEN:
            getattr(self, name)[:] = getattr(new, name)
        self.writes[:], self.written_epoch[:] = writes, written_epoch
        self._unsynced[:] = 0
        self.epoch = new.epoch
        self.fingerprint = self.fingerprint or stored

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as an .npz file without pickle; killed at any moment, the old file stays whole."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "xb") as file:
                np.savez(file, **self.state_dict())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            raise
        # The rename itself must survive a power cut too.
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: str = "") -> RegionTable:
        """Read a table written by ``save``; give the index's fingerprint to have it checked.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it was made for another data set, or is damaged.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"There is no region table at {path}; save one there first or mend the path."
            )
        with open(path, "rb") as raw:  # outside the try: a file one may not read is not a damaged file
            try:
                with np.load(raw, allow_pickle=False) as file:
                    state: dict[str, Any] = {name: file[name] for name in (*_COLUMNS, "epoch", "fingerprint")}
                length, regions = state["weights"].shape
                table = cls(length, regions)
                table.load_state_dict(state)
            except _DAMAGE as error:
                raise ValueError(
                    f"{path} is not a readable region table ({error}); delete it or restore it from a copy."
                ) from error
        _same_data_set(f"The region table {path}", table.fingerprint, fingerprint)
        table.fingerprint = table.fingerprint or fingerprint
        return table


def _same_data_set(what: str, own: str, other: str) -> None:
    if own and other and own != other:
        raise ValueError(
            f"{what} was made for another data set (fingerprint {own[:12]}, not {other[:12]}); "
            "use the index it was made with, or start a new table."
        )


def _column(state: Mapping[str, Any], name: str) -> Any:
    if name not in state:
        raise ValueError(f"The state has no '{name}'; pass what state_dict() returned.")
    return state[name]


def _as_array(values: Any, name: str, kinds: str = "iuf") -> Array:
    if hasattr(values, "detach"):  # a torch tensor, without importing torch
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        values = (values.double() if values.is_floating_point() else values).numpy()
    array = np.asarray(values)
    if array.dtype.kind not in kinds:
        raise TypeError(
            f"{name} holds {array.dtype} values; give {'truth values' if kinds == 'b' else 'numbers'}."
        )
    return array


def _as_floats(values: Any, name: str) -> NDArray[np.float64]:
    return _as_array(values, name).astype(np.float64)


def _as_rows(values: Any, name: str) -> NDArray[np.int64]:
    array = _as_array(values, name)
    if array.dtype.kind == "f" and array.size:
        raise TypeError(f"{name} holds {array.dtype} values; give integers.")
    return array.astype(np.int64)


def _per_region(
    values: NDArray[np.float64], name: str, rows: Array, regions: int, tail: tuple[int, ...] = ()
) -> NDArray[np.float64]:
    full = (len(rows), regions, *tail)
    if values.shape == (len(rows), *tail):
        return np.broadcast_to(values[:, None], full)
    if values.shape != full:
        raise ValueError(
            f"{name} has shape {values.shape}; give {full} or {(len(rows), *tail)} to match index."
        )
    return values


def _refuse(bad: Any, rows: Array, why: Callable[[int], str]) -> None:
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(f"Row {rows[i]} (position {i}) {why(i)}; nothing was written.")


def _check_boxes(boxes: NDArray[np.float64], rows: Array) -> NDArray[np.float32]:
    def has(what: str) -> Callable[[int], str]:
        return lambda i: f"has a box {what}: {boxes[i].round(7).tolist()} (y0, x0, y1, x1)"

    _refuse(~np.isfinite(boxes).all((1, 2)), rows, has("with NaN or infinity"))
    _refuse(((boxes < -_TOLERANCE) | (boxes > 1 + _TOLERANCE)).any((1, 2)), rows, has("outside [0, 1]"))
    clipped = boxes.clip(0, 1).astype(np.float32)
    # Compared in float32: a box can be empty after rounding only.
    _refuse((clipped[..., 2:] <= clipped[..., :2]).any((1, 2)), rows, has("that is inverted or empty"))
    return clipped


def _check_weights(weights: NDArray[np.float64], rows: Array) -> NDArray[np.float32]:
    def has(what: str) -> Callable[[int], str]:
        return lambda i: f"has {what}: {weights[i].tolist()}"

    with np.errstate(over="ignore"):
        rounded = weights.astype(np.float32)
    _refuse(~np.isfinite(rounded).all(1), rows, has("a weight that is NaN or infinite"))
    _refuse((rounded < 0).any(1), rows, has("a negative weight"))
    if weights.shape[1] > 1:
        _refuse((rounded == 0).all(1), rows, has("only zero weights, so that no region can be drawn"))
    return rounded


def _check_partner(partner: NDArray[np.int64], rows: Array, length: int) -> NDArray[np.int64]:
    if partner.shape != rows.shape:
        raise ValueError(f"partner has shape {partner.shape}; give {rows.shape} to match index.")
    outside = (partner < 0) | (partner >= length)
    _refuse(outside, rows, lambda i: f"has partner {partner[i]}, which is not in the table of {length} rows")
    return partner


def _checked_columns(state: Mapping[str, Any], length: int, regions: int) -> Regions:
    boxes, weights = (_as_floats(_column(state, name), name) for name in ("boxes", "weights"))
    partner = _as_rows(_column(state, "partner"), "partner")
    written = _as_array(_column(state, "written"), "written", kinds="b")
    shapes = [column.shape for column in (boxes, weights, partner, written)]
    if shapes != [(length, regions, 4), (length, regions), (length,), (length,)]:
        raise ValueError(
            f"The stored shapes {shapes} do not fit {length} rows of {regions} regions; use the index and "
            "the number of regions they were made with."
        )
    rows = np.arange(length)
    return _freeze(
        _check_boxes(boxes, rows),
        _check_weights(weights, rows),
        _check_partner(partner, rows, length),
        written,
        int(_column(state, "epoch")),
    )


def _freeze(
    boxes: NDArray[np.float32],
    weights: NDArray[np.float32],
    partner: NDArray[np.int64],
    written: NDArray[np.bool_],
    epoch: int,
) -> Regions:
    copies = boxes.copy(), weights.copy(), partner.copy(), written.copy()
    for array in copies:
        array.flags.writeable = False
    return Regions(*copies, epoch=epoch)


def _all_gather(array: Array) -> list[Array]:
    """The array of every rank, in rank order; shapes must agree."""
    import torch
    import torch.distributed as dist

    # A mixed "cpu:gloo,cuda:nccl" group takes CPU tensors; NCCL alone does not.
    backend = str(dist.get_backend())
    device = f"cuda:{torch.cuda.current_device()}" if "nccl" in backend and "gloo" not in backend else "cpu"
    mine = torch.from_numpy(array).to(device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [tensor.cpu().numpy() for tensor in everyone]
