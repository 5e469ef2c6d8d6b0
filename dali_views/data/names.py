"""Names of images as one array of bytes: 100 million of them as Python objects would not fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["LeftOut", "may_be_name", "pack_names", "unpack_names"]


class LeftOut(NamedTuple):
    """A file that was listed but is not in the index."""

    path: str
    """Relative to the root of the index."""
    reason: str


def pack_names(names: Sequence[bytes]) -> NDArray[np.uint8]:
    """(N, L) bytes of N names, padded with NULs to the longest."""
    packed = np.array(names, dtype=np.bytes_)
    return packed.view(np.uint8).reshape(len(names), packed.itemsize)


def unpack_names(paths: NDArray[np.uint8]) -> list[bytes]:
    """The N names that `pack_names` packed."""
    names: list[bytes] = np.ascontiguousarray(paths).view(f"S{paths.shape[1]}").ravel().tolist()
    return names


def may_be_name(name: bytes) -> bool:
    """Whether an image may have this name: a path below the root, printable, so that it fits a line."""
    try:
        printable = name.decode().isprintable() and name[:1] not in (b"", b"/")
    except UnicodeDecodeError:
        return False
    return printable and b".." not in name.split(b"/")
