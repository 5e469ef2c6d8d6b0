"""How the rows of a region table travel between ranks: only changed ones, in rounds of bounded memory."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..system.collective import all_gather, world
from .columns import Columns, chunks, row_type
from .rows import Array

_SYNC_ROWS = 1 << 17  # rows of the table covered by one round; bounds the memory of exchange()


@dataclass
class Traffic:
    """What was received from other ranks: nothing in a world of one."""

    rows: int = 0
    bytes: int = 0
    """Of the rows, and of what was sent to pad and to count them."""
    seconds: float = 0.0
    """In `sync`, with waiting for the slowest rank."""


def exchange(
    columns: Columns,
    changed: NDArray[np.int64],
    packed: Callable[[slice], Array],
    fingerprint: str,
    traffic: Traffic,
) -> Iterator[Array]:
    """Gives all ranks the rows that any of them has changed; a collective call on the default process group.

    To be taken to its end, on all ranks.

    Args:
        columns: Of the table, for their number, types and shapes.
        changed: (C,) numbers of the rows that this rank has changed, in order.
        packed: The rows of a slice of `changed`, in `row_type`.
        fingerprint: Of the data set the rows belong to.
        traffic: Rows and bytes received are added to it.

    Yields:
        Rows in `row_type`, each once, equal on all ranks: the whole row of the highest rank that changed it,
        but `writes` with what all ranks have added.

    Raises:
        ValueError: On every rank, if the tables differ in length, regions or fingerprint.
    """
    length, regions = columns["weights"].shape
    refuse_different_tables(length, regions, fingerprint)
    # Rounds are ranges of row numbers, so every conflict is settled within one round.
    cuts = np.searchsorted(changed, np.arange(0, length + _SYNC_ROWS, _SYNC_ROWS))
    counts = np.stack(all_gather(np.diff(cuts).astype(np.int64)))
    others = len(counts) - 1
    traffic.rows += int(counts.sum()) - len(changed)
    traffic.bytes += others * counts[0].nbytes
    for part, count in enumerate(counts.T):
        if not count.any():
            continue
        mine = np.zeros(count.max(), row_type(columns))  # padded, as shapes must agree
        mine[: cuts[part + 1] - cuts[part]] = packed(slice(cuts[part], cuts[part + 1]))
        traffic.bytes += others * mine.nbytes
        everyone = zip(all_gather(mine.view(np.uint8)), count, strict=True)
        yield _settled(np.concatenate([theirs.view(mine.dtype)[:n] for theirs, n in everyone]))


def _settled(news: Array) -> Array:
    """Rows in rank order, of which some repeat, as rows that do not."""
    # Backwards, for of equal numbers the first is found.
    _, place, which = np.unique(news["row"][::-1], return_index=True, return_inverse=True)
    settled = news[::-1][place]
    np.add.at(settled["writes"], which, news["added"][::-1])
    return settled


def check_equal(columns: Mapping[str, Array]) -> None:
    """Compares the columns of all ranks by checksum; a collective call.

    Raises:
        ValueError: On every rank, if a column differs; the message names columns and ranks.
    """
    if world() == 1:
        return
    sums = np.stack(all_gather(np.array([_checksum(column) for column in columns.values()], np.int64)))
    unlike = sums != sums[0]
    if unlike.any():
        names = [name for name, differs in zip(columns, unlike.any(0), strict=True) if differs]
        ranks = np.flatnonzero(unlike.any(1)).tolist()
        raise ValueError(
            f"The RegionTables of ranks {ranks} differ from rank 0's in {', '.join(names)}; call sync() "
            "after update(), or write the same rows on all ranks."
        )


def _checksum(column: Array) -> int:
    found = 0
    for part in chunks(len(column)):
        found = zlib.crc32(np.ascontiguousarray(column[part]).data, found)
    return found


def refuse_different_tables(length: int, regions: int, fingerprint: str) -> None:
    """A collective call.

    Raises:
        ValueError: On every rank, if not all have given the same.
    """
    digest = int.from_bytes(hashlib.sha256(fingerprint.encode()).digest()[:7], "big")
    tables = np.stack(all_gather(np.array([length, regions, digest], np.int64)))
    if (tables != tables[0]).any():
        raise ValueError(
            f"The ranks hold different RegionTables ((rows, regions) per rank: {tables[:, :2].tolist()}, "
            f"{len(set(tables[:, 2].tolist()))} fingerprint(s)); build all of them from the same index."
        )
