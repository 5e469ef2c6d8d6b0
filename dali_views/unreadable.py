"""Images that turn out to be unreadable while running: how they are found, and who stands in for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from . import pipeline, rng
from .index import SampleIndex
from .plan import I64, Bool


class Unreadable:
    """The rows of an index whose images could not be read, each replaced by another row drawn by rule.

    Args:
        seed: of the draw of the substitutes.
        device: ``"gpu"`` or ``"cpu"``, whose decoder must be able to read an image; device_id: CUDA ordinal.
    """

    reasons: dict[int, str]
    """Why, by row."""

    def __init__(self, index: SampleIndex, seed: int, device: str, device_id: int | None) -> None:
        self.reasons = {}
        self._index = index
        self._seed = seed
        self._device = device
        self._device_id = device_id

    def __len__(self) -> int:
        return len(self.reasons)

    def readable(self, rows: I64) -> Bool:
        """(B,) False for the rows found unreadable so far."""
        if not self.reasons:
            return np.ones(len(rows), np.bool_)
        return ~np.isin(rows, list(self.reasons))

    def replaced(self, rows: I64) -> I64:
        """(B,) the rows, with each unreadable one replaced by a sample drawn from (seed, row) alone."""
        slot = 0
        wanted = rows
        while not (good := self.readable(rows)).all():
            substitute = rng.bits(rng.keys(self._seed, wanted), slot) % np.uint64(len(self._index))
            rows = np.where(good, rows, substitute.astype(np.int64))
            slot += 1
        return rows

    def search(self, rows: I64) -> dict[int, str]:
        """Decode each row's file alone; remember and return those that fail, with the reason."""
        if self._index.arrays is not None:
            return {}
        found = {}
        for row in np.unique(rows).tolist():
            path = self._index.path(row)
            if not Path(path).is_file():
                found[row] = "the file is gone"
            elif (reason := pipeline.decode_error(path, self._device, self._device_id)) is not None:
                found[row] = reason
        self.reasons.update(found)
        return found
