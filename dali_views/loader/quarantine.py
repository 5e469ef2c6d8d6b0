"""Unreadable images: found when a batch fails, remembered with the reason, and left out from then on."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..data.headers import inspect
from ..data.remote import is_remote
from ..data.source import GONE, reason
from ..graph.decode import HW_DECODER_LOAD, Alone
from ..plan.draw import I64, Bool
from ..system.files import unpack_names

if TYPE_CHECKING:
    from ..data.index import SampleIndex

_NAMED = 20  # files in an error
_CHUNK = 1 << 20  # names of an index that are compared at a time


class BadImageError(OSError):
    """An image is unreadable and may not be replaced, or too many are."""


class Quarantine:
    """The rows of an index whose images are unreadable.

    `index.quarantine` has the reasons by path and is shared by the loaders of an index and of its subsets;
    a loader works with this mask of its rows.

    Args:
        device: ``"gpu"`` or ``"cpu"``, whose decoder must read an image; device_id: CUDA ordinal.
        hw_decoder_load: of the loader.
        strict: refuse rows in quarantine.
    """

    def __init__(
        self, index: SampleIndex, device: str, device_id: int | None, hw_decoder_load: float, strict: bool
    ) -> None:
        self._index = index
        self._files = index.quarantine
        self._known: dict[str, str] = {}  # files as of the last refresh
        self._bad = np.zeros(len(index), np.bool_)  # takes memory where it is written
        self._decoder = device, device_id, hw_decoder_load
        self._strict = strict
        self.count = 0  # rows in quarantine

    def refresh(self) -> None:
        """Follow changes of `index.quarantine` by other loaders or by the user."""
        if self._files == self._known or self._index.paths is None:
            return
        self._known = dict(self._files)
        start = os.path.join(self._index.root, "")
        wanted = {os.fsencode(path.removeprefix(start)) for path in self._known}
        for first in range(0, len(self._bad) if wanted or self.count else 0, _CHUNK):
            names = unpack_names(self._index.paths[first : first + _CHUNK])
            self._bad[first : first + _CHUNK] = [name in wanted for name in names]
        self.count = int(np.count_nonzero(self._bad))

    def readable(self, rows: I64) -> Bool:
        """(B,) False for rows in quarantine.

        Raises:
            BadImageError: with `strict`, if a row is in quarantine; otherwise if all N are.
        """
        if len(self._files) != len(self._known):  # a full comparison is made when an epoch begins
            self.refresh()
        bad = self._bad[rows]
        if bad.any():
            if self._strict:
                path = self._index.path(int(rows[bad][0]))
                raise BadImageError(
                    f'{path}: {self._known[path]}; fix the file, leave it out or set on_bad_image to "skip".'
                )
            if self.count == len(self._bad):
                self.check_share(1.0)
        return ~bad

    def search(self, rows: I64) -> dict[int, str]:
        """Put the `undecodable` ones of rows into quarantine and return them with the reason."""
        if self._index.arrays is not None:
            return {}
        found = undecodable(self._index, np.unique(rows), *self._decoder)
        self.add(found)
        return found

    def add(self, found: Mapping[int, str]) -> None:
        """Put rows into quarantine, with the reason."""
        self.refresh()
        for row, why in found.items():
            self._files[self._index.path(row)] = self._known[self._index.path(row)] = why
            self.count += not self._bad[row]
            self._bad[row] = True

    def reasons(self) -> dict[int, str]:
        """The rows in quarantine, with the reason."""
        self.refresh()
        rows = np.flatnonzero(self._bad).tolist() if self.count else []
        return {row: self._known[self._index.path(row)] for row in rows}

    def check_share(self, most: float) -> None:
        """Raise a BadImageError with the list if more than the share `most` is unreadable, or all images."""
        total = len(self._bad)
        beyond = self.count > most * total
        if not beyond and self.count < total:
            return
        remedy = (
            f", more than max_bad_share {most:g}; fix the files or raise it" if beyond else "; fix the files"
        )
        named = [f"{self._index.path(row)}: {why}" for row, why in self.reasons().items()]
        more = [f"and {len(named) - _NAMED} more"] if len(named) > _NAMED else []
        told = f"{self.count} of {total} images cannot be read{remedy}:"
        raise BadImageError("\n  ".join([told, *named[:_NAMED], *more]))


def undecodable(
    index: SampleIndex, rows: I64, device: str, device_id: int | None,
    hw_decoder_load: float = HW_DECODER_LOAD,
) -> dict[int, str]:  # fmt: skip
    """Decode the images of rows one by one; those that the loader cannot decode, with the reason.

    Raises:
        BadImageError: the folder or the source of the index is gone, so no image is to blame.
        RuntimeError: the memory of the GPU is full, or the decoder refuses a sound image, too.
    """
    if index.root and not is_remote(index.root) and not os.path.isdir(index.root):
        raise BadImageError(f"The image folder {index.root!r} is gone, for example unmounted; restore it.")
    alone = Alone(device, device_id, hw_decoder_load)
    found = {}
    for row in rows.tolist():
        try:
            encoded = index.encoded(row)
        except GONE as error:
            raise BadImageError(f"The source of the images is gone ({error}); restore it.") from error
        except Exception as error:
            found[row] = reason(error)
            continue
        height, width, wrong = inspect(io.BytesIO(encoded), len(encoded))
        known = tuple(index.sizes[row].tolist())
        if refused := alone.refusal(encoded):
            # The header scan explains more than the decoder.
            found[row] = wrong or f"the decoder refuses it ({refused})"
        elif not wrong and (height, width) != known:
            found[row] = f"{height} x {width} pixels, and indexed as {known[0]} x {known[1]}; index again"
    return found
