"""Images that turn out to be unreadable while running: remembered with the reason, and replaced by rule."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from itertools import islice

import numpy as np

from ..data.headers import inspect
from ..data.index import SampleIndex
from ..data.remote import is_remote
from ..data.source import GONE, reason
from ..graph import build as pipeline
from ..plan import rng
from ..plan.draw import I64, Bool

__all__ = ["BadImageError", "Substitutes"]

_TOLD = 20  # files in an error
_EXAMPLES = 3
_DRAWS = 64  # of a substitute, before the next readable row is taken


class BadImageError(OSError):
    """An image cannot be read and may not be replaced, or too many cannot."""


class Substitutes:
    """Who stands in for the rows of an index whose images are in quarantine.

    Args:
        seed: of the draw.
        device: ``"gpu"`` or ``"cpu"``, whose decoder must be able to read an image; device_id: CUDA ordinal.
    """

    met: set[int]
    """Rows asked for so far that are in quarantine."""

    def __init__(self, index: SampleIndex, seed: int, device: str, device_id: int | None) -> None:
        self.met = set()
        self._index = index
        self._files = index.quarantine
        self._seed = seed
        self._device = device
        self._device_id = device_id

    def readable(self, rows: I64) -> Bool:
        """(B,) False for the rows that are in quarantine."""
        if not self._files or self._index.arrays is not None:
            return np.ones(len(rows), np.bool_)
        good = np.array([self._index.path(row) not in self._files for row in rows.tolist()], np.bool_)
        self.met.update(rows[~good].tolist())
        return good

    def replaced(self, rows: I64) -> I64:
        """(B,) the rows, with each one in quarantine replaced by a sample drawn from (seed, row) alone.

        The draw is repeated until it finds a readable one, so that it is the same whoever has found out
        about which file.

        Raises:
            BadImageError: no image of the index is readable.
        """
        wanted = rows
        for slot in range(_DRAWS + len(self._index)):
            good = self.readable(rows)
            if good.all():
                return rows
            if slot < _DRAWS:
                drawn = rng.bits(rng.keys(self._seed, wanted), slot) % np.uint64(len(self._index))
                substitute = drawn.astype(np.int64)
            else:
                substitute = (rows + 1) % len(self._index)
            rows = np.where(good, rows, substitute)
        told = [f"{path}: {reason}" for path, reason in islice(self._files.items(), _EXAMPLES)]
        raise BadImageError(
            "Every image of the data set turned out to be unreadable, for example:\n  " + "\n  ".join(told)
        )

    def search(self, rows: I64) -> dict[int, str]:
        """Decode each row's file alone; put those that fail into quarantine and return them with the reason.

        Raises:
            BadImageError: the folder or the source of the index is gone, which is no fault of the images.
            RuntimeError: nor is it if the memory of the GPU is full, or the decoder refuses a sound image.
        """
        if self._index.arrays is not None:
            return {}
        found = undecodable(self._index, np.unique(rows), self._device, self._device_id)
        self.add(found)
        return found

    def add(self, found: Mapping[int, str]) -> None:
        """Put rows into quarantine, with the reason."""
        self._files.update({self._index.path(row): reason for row, reason in found.items()})
        self.met.update(found)

    def reasons(self) -> dict[int, str]:
        """The rows met so far that are in quarantine, with the reason."""
        paths = {row: self._index.path(row) for row in sorted(self.met)}
        return {row: self._files[path] for row, path in paths.items() if path in self._files}

    def refuse(self, rows: I64) -> None:
        """Raise a BadImageError if one of the rows (B,) is in quarantine."""
        for row in rows[~self.readable(rows)].tolist():
            path = self._index.path(row)
            raise BadImageError(
                f'{path}: {self._files[path]}; mend the file, leave it out or set on_bad_image to "skip".'
            )

    def check_share(self, most: float) -> None:
        """Raise a BadImageError with the list if more than the share `most` of the images was met."""
        if len(self.met) > most * len(self._index) and len(self.reasons()) > most * len(self._index):
            told = [f"{self._index.path(row)}: {reason}" for row, reason in self.reasons().items()]
            more = [f"and {len(told) - _TOLD} more"] if len(told) > _TOLD else []
            raise BadImageError(
                f"{len(told)} of {len(self._index)} images cannot be read, more than max_bad_share {most:g}; "
                "mend the files or raise it:\n  " + "\n  ".join(told[:_TOLD] + more)
            )


def undecodable(index: SampleIndex, rows: I64, device: str, device_id: int | None) -> dict[int, str]:
    """Those of the rows whose images the loader cannot decode, each tried alone, with the reason.

    Raises:
        BadImageError: the folder or the source of the index is gone.
        RuntimeError: the memory of the GPU is full, or the decoder refuses a sound image, too.
    """
    if index.root and not is_remote(index.root) and not os.path.isdir(index.root):
        raise BadImageError(f"The image folder {index.root!r} is gone, for example unmounted; bring it back.")
    alone = pipeline.Alone(device, device_id)
    found = {}
    for row in rows.tolist():
        try:
            encoded = index.encoded(row)
        except GONE as error:
            raise BadImageError(f"The source of the images is gone ({error}); bring it back.") from error
        except Exception as error:
            found[row] = reason(error)
            continue
        height, width, told = inspect(io.BytesIO(encoded), len(encoded))
        known = tuple(index.sizes[row].tolist())
        if refused := alone.refusal(encoded):
            # What the header scan has against it says more than the decoder.
            found[row] = told or f"the decoder refuses it ({refused})"
        elif not told and (height, width) != known:
            found[row] = f"{height} x {width} pixels, and indexed as {known[0]} x {known[1]}; index again"
    return found
