"""Snapshot: a region table as it was at one moment. Also the checks of a stored table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rows import FROZEN, Array, as_array, check, chunks, new_columns


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A frozen RegionTable, with the same shapes and dtypes. Its arrays are read-only and do not change."""

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

    def equals(self, other: Snapshot) -> bool:
        """Whether all values are the same."""
        alike = (np.array_equal(getattr(self, name), getattr(other, name)) for name in FROZEN)
        return self.epoch == other.epoch and all(alike)

    def state_dict(self) -> dict[str, Any]:
        """Plain dict of NumPy arrays (copies) and an int, for a checkpoint."""
        columns: dict[str, Any] = {name: getattr(self, name).copy() for name in FROZEN}
        return {**columns, "epoch": self.epoch}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Snapshot:
        """Rebuild from ``state_dict()``; arrays may be NumPy or torch. Errors as of `checked_state`."""
        shape = as_array(entry(state, "boxes"), "boxes", "iuf").shape
        if len(shape) != 3:
            raise ValueError(
                f"The stored boxes have shape {shape}, not (N, K, 4); this is no state of a Snapshot."
            )
        columns, epoch = checked_state(state, FROZEN, shape[0], shape[1])
        return cls(**columns, epoch=epoch)


def read_only(array: Array) -> Array:
    """A view of the same memory that refuses writes."""
    view = array.view()
    view.flags.writeable = False
    return view


def entry(state: Mapping[str, Any], name: str) -> Any:
    """A required value of a state."""
    if name not in state:
        raise ValueError(f"The state has no '{name}'; pass what state_dict() returned.")
    return state[name]


def checked_state(
    state: Mapping[str, Any], names: Sequence[str], length: int, regions: int
) -> tuple[dict[str, Array], int]:
    """The columns `names` of a state, as copies, and its epoch; every row is checked.

    Raises:
        ValueError: a key is missing, shapes do not fit, or a value is not allowed in a table.
        TypeError: a value has the wrong type.
    """
    found = {}
    for name in names:
        like, shape = new_columns(length, regions)[name], tuple(np.shape(entry(state, name)))
        if shape != like.shape:
            raise ValueError(
                f"The stored {name} of shape {shape} do not fit {length} rows of {regions} regions; use the "
                "index and the number of regions they were made with."
            )
        found[name] = np.empty(shape, like.dtype)
        for part in chunks(length):
            rows = np.arange(part.start, part.stop)
            found[name][part] = check(name, state[name][part], rows, length, regions)
    epoch = as_array(entry(state, "epoch"), "epoch", "iu")
    if epoch.shape or not -(2**31) <= epoch < 2**31:
        raise ValueError(f"The stored epoch {epoch} is not the number of an epoch; the state is damaged.")
    return found, int(epoch)
