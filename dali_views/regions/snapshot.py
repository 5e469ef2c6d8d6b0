"""Regions: a region table as it was at one moment; and what a stored state of a table must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .columns import FROZEN, chunks
from .rows import Array, as_array, check_boxes, check_partner, check_weights

__all__ = ["Regions", "checked_columns", "checked_counts", "checked_epoch", "entry", "read_only"]

_END = 2**31  # of the integers in `writes` and `written_epoch`
_KINDS = {"boxes": "iuf", "weights": "iuf", "partner": "iu", "written": "b"}


@dataclass(frozen=True, eq=False)
class Regions:
    """A frozen RegionTable, with the same shapes and dtypes.

    Its arrays are read-only, and later updates of the table do not reach it.
    """

    boxes: NDArray[np.float32]
    weights: NDArray[np.float32]
    partner: NDArray[np.int64]
    written: NDArray[np.bool_]
    epoch: int

    def __post_init__(self) -> None:
        for name in FROZEN:
            object.__setattr__(self, name, read_only(getattr(self, name)))

    def __len__(self) -> int:
        return len(self.partner)

    def equals(self, other: Regions) -> bool:
        """Whether all values are the same."""
        alike = (np.array_equal(getattr(self, name), getattr(other, name)) for name in FROZEN)
        return self.epoch == other.epoch and all(alike)

    def state_dict(self) -> dict[str, Any]:
        """Plain dict of NumPy arrays (copies) and an int, for a checkpoint."""
        columns: dict[str, Any] = {name: getattr(self, name).copy() for name in FROZEN}
        return {**columns, "epoch": self.epoch}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Regions:
        """Rebuild from ``state_dict()``; arrays may be NumPy or torch.

        Raises:
            ValueError: a key is missing, shapes do not agree, or a value is not allowed in a table.
            TypeError: a value is of another kind.
        """
        shape = as_array(entry(state, "boxes"), "boxes", "iuf").shape
        if len(shape) != 3:
            raise ValueError(
                f"The stored boxes have shape {shape}, not (N, K, 4); the state is not of Regions."
            )
        return cls(**checked_columns(state, shape[0], shape[1]), epoch=checked_epoch(state))


def read_only(array: Array) -> Array:
    """The same memory, not to be written this way."""
    view = array.view()
    view.flags.writeable = False
    return view


def entry(state: Mapping[str, Any], name: str) -> Any:
    """A value of a state, which must have it."""
    if name not in state:
        raise ValueError(f"The state has no '{name}'; pass what state_dict() returned.")
    return state[name]


def checked_columns(state: Mapping[str, Any], length: int, regions: int) -> dict[str, Array]:
    """The columns of a state that a snapshot holds, as copies, every row checked."""
    given = {name: as_array(entry(state, name), name, _KINDS[name]) for name in FROZEN}
    shapes = [column.shape for column in given.values()]
    if shapes != [(length, regions, 4), (length, regions), (length,), (length,)]:
        raise ValueError(
            f"The stored shapes {shapes} do not fit {length} rows of {regions} regions; use the index and "
            "the number of regions they were made with."
        )
    boxes, weights = np.empty((length, regions, 4), np.float32), np.empty((length, regions), np.float32)
    partner = np.empty(length, np.int64)
    for part in chunks(length):
        rows = np.arange(part.start, part.stop)
        boxes[part] = check_boxes(given["boxes"][part], rows, regions)
        weights[part] = check_weights(given["weights"][part], rows, regions)
        partner[part] = check_partner(given["partner"][part], rows, length)
    written = given["written"].astype(np.bool_)
    return {"boxes": boxes, "weights": weights, "partner": partner, "written": written}


def checked_counts(state: Mapping[str, Any], length: int) -> dict[str, Array]:
    """The other columns of a state, as copies."""
    counts = {name: as_array(entry(state, name), name, "iu") for name in ("writes", "written_epoch")}
    for name, column in counts.items():
        if column.shape != (length,) or not ((column >= -1) & (column < _END)).all():
            raise ValueError(f"The stored {name} do not have {length} rows of counts; the state is damaged.")
    return {name: column.astype(np.int32) for name, column in counts.items()}


def checked_epoch(state: Mapping[str, Any]) -> int:
    """The epoch of a state."""
    epoch = as_array(entry(state, "epoch"), "epoch", "iu")
    if epoch.shape or not -_END <= epoch < _END:
        raise ValueError(f"The stored epoch {epoch} is no number of an epoch; the state is damaged.")
    return int(epoch)
