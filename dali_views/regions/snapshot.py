"""Snapshot: a region table as it was at one moment. Also the form of a stored table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..system.stored import EPOCHS, Form, Unfit, check, entries, numbers, whole
from .rows import FROZEN, Array, chunks, new_columns
from .rows import check as check_values
from .sync import check_equal

REMEDY = "pass what state_dict() returned, for the index and the number of regions that it was made with."


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

    def check_equal(self) -> None:
        """As `RegionTable.check_equal`; a collective call."""
        check_equal({name: getattr(self, name) for name in FROZEN})

    def state_dict(self) -> dict[str, Any]:
        """Plain dict of NumPy arrays (copies) and an int, for a checkpoint."""
        columns: dict[str, Any] = {name: getattr(self, name).copy() for name in FROZEN}
        return {**columns, "epoch": self.epoch}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Snapshot:
        """Rebuild from ``state_dict()``; arrays may be NumPy or torch. A ValueError if it is damaged."""
        snapshot: Snapshot = check(state, snapshot_form(), "The state of the snapshot", REMEDY)
        return snapshot


def read_only(array: Array) -> Array:
    """A view of the same memory that refuses writes."""
    view = array.view()
    view.flags.writeable = False
    return view


def columns_form(names: Sequence[str], length: int | None = None, regions: int | None = None) -> Form:
    """The form of a stored table: the columns `names`, and its epoch.

    Without a length or a number of regions, those of the boxes count. Every row is checked; what the form
    returns are copies in the types of a table.
    """

    def form(state: Any, place: str) -> dict[str, Any]:
        boxes = entries({"boxes": numbers((length, regions, 4))})(state, place)["boxes"]
        likes = new_columns(len(boxes), boxes.shape[1])
        shapes = {name: numbers(likes[name].shape) for name in names}
        found: dict[str, Any] = entries({**shapes, "epoch": whole(-(2**31), EPOCHS)})(state, place)
        for name in names:
            column = np.empty(likes[name].shape, likes[name].dtype)
            for part in chunks(len(column)):
                rows = np.arange(part.start, part.stop)
                try:
                    column[part] = check_values(name, found[name][part], rows, *boxes.shape[:2])
                except (TypeError, ValueError) as error:
                    told = str(error).removesuffix(".").removesuffix("; nothing was written")
                    raise Unfit(f"has a wrong {place + '.' if place else ''}{name}: {told}") from None
            found[name] = column
        return found

    return form


def snapshot_form(length: int | None = None, regions: int | None = None) -> Form:
    """The form of a stored snapshot, see `columns_form`; it returns a `Snapshot`."""
    columns = columns_form(FROZEN, length, regions)
    return lambda state, place: Snapshot(**columns(state, place))


def agreed(what: str, own: str, other: str) -> str:
    """The one fingerprint of two; either may be empty."""
    if own and other and own != other:
        raise ValueError(
            f"{what} was made for another data set (fingerprint {own[:12]}, not {other[:12]}); "
            "use the index it was made with, or start a new table."
        )
    return own or other
