"""A source without files, the same in every process."""

from __future__ import annotations

import numpy as np

COUNT = 400


def image_of(row: int) -> bytes:
    """What stands for the image of a row; the larger, the later."""
    return np.random.default_rng(row).bytes(500 + 37 * row)


class Made:
    """A `Source` of `COUNT` of these."""

    def __len__(self) -> int:
        return COUNT

    def read(self, rows: np.ndarray) -> list[bytes]:
        return [image_of(row) for row in rows.tolist()]
