"""Source: encoded images that Python code reads, for data sets that are no folders of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Form: TypeAlias = Literal["names", "bytes", "pixels"]
"""How the graph is given its images: files to be read, encoded bytes, or decoded pixels."""


class SourceGoneError(OSError):
    """A source as a whole cannot be read, which is no fault of its images."""


GONE = (SourceGoneError, ConnectionError)
"""Errors of `Source.read` that end a run; any other makes bad images of the rows that raise it."""


class Source(Protocol):
    """N encoded images (JPEG, PNG, ...) in a table, an archive, a bucket, numbered from 0."""

    def __len__(self) -> int:
        """The number of images; it does not change."""
        ...

    def read(self, rows: NDArray[np.int64]) -> Sequence[bytes | NDArray[np.uint8]]:
        """What the image files of some rows hold, byte by byte.

        Called by several threads at once, each with a part of a batch. What it returns may be memory that the
        source keeps, if nobody changes it. To try again after a failure of the network is its own affair.

        Args:
            rows: (n,) in any order, maybe with repetitions.

        Returns:
            n times bytes, or a 1-D array of uint8, in the order of `rows`.

        Raises:
            SourceGoneError, ConnectionError: The whole source cannot be read; this ends the run.
            Exception: Any other, for at least one of the rows. Then each is asked for alone, and an image
                whose row raises again is a bad one, for the reason that the error tells.
        """
        ...


@dataclass(frozen=True, eq=False)
class Picked:
    """Some rows of a source, as a source."""

    whole: Source
    rows: NDArray[np.int64]
    """(n,) of the whole."""

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: NDArray[np.int64]) -> Sequence[bytes | NDArray[np.uint8]]:
        """See `Source`."""
        return self.whole.read(self.rows[rows])


def picked(source: Source, rows: NDArray[np.int64]) -> Picked:
    """The source of some rows (n,), in the order given; of a part's part no chain grows."""
    return Picked(source.whole, source.rows[rows]) if isinstance(source, Picked) else Picked(source, rows)


def read_rows(source: Source, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """The encoded images of rows (n,) as 1-D arrays, which share the memory of what the source returned.

    Raises:
        TypeError: The source returned something else than the protocol says.
        Exception: Whatever the source raised.
    """
    found = source.read(rows)
    arrays = [np.frombuffer(one, np.uint8) if isinstance(one, bytes) else one for one in found]
    if len(arrays) != len(rows):
        raise TypeError(f"the source returned {len(arrays)} images for {len(rows)} rows")
    for one in arrays:
        if not isinstance(one, np.ndarray) or one.dtype != np.uint8 or one.ndim != 1:
            raise TypeError(f"the source returned {type(one).__name__}, not bytes or a 1-D array of uint8")
    return arrays


def read_each(source: Source, rows: NDArray[np.int64]) -> list[NDArray[np.uint8] | str]:
    """As `read_rows`, but where the source raises each row is asked for alone; why, of one that raises again.

    Raises:
        SourceGoneError, ConnectionError: The whole source cannot be read.
    """
    try:
        return [*read_rows(source, rows)] if len(rows) else []
    except GONE:
        raise
    except Exception as error:
        if len(rows) == 1:
            return [reason(error)]
    return [one for row in rows for one in read_each(source, row[None])]


def reason(error: Exception) -> str:
    """Why an image is left out whose bytes could not be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot be read ({' '.join(told.split()) or type(error).__name__})"
