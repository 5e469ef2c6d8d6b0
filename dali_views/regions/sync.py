"""How the rows of a region table travel between ranks: only changed rows, in rounds of bounded memory."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..system.ranks import all_gather, world
from .rows import Array, Columns, chunks

_ROUND = 1 << 17  # rows of the table that one round covers; bounds the memory of `exchange`


@dataclass
class Traffic:
    """What this rank received from other ranks: rows, their bytes (with padding and counts), and seconds in
    `sync`, including the wait for the slowest rank. Nothing in a world of one."""

    rows: int = 0
    bytes: int = 0
    seconds: float = 0.0


def exchange(
    columns: Columns, unsynced: NDArray[np.int32], fingerprint: str, traffic: Traffic
) -> Iterator[Array]:
    """Give all ranks the rows that any of them changed; a collective call, to be iterated to the end.

    Args:
        columns, fingerprint: of this rank's table.
        unsynced: (N,) how often this rank wrote each row since the last exchange.
        traffic: rows and bytes received are added to it.

    Yields:
        Packed rows, each row number once, equal on all ranks: the whole row of the highest rank that changed
        it, with the `writes` of all ranks summed.

    Raises:
        ValueError: on every rank, if the tables differ in length, regions or fingerprint.
    """
    length, regions = columns["weights"].shape
    _refuse_different_tables(length, regions, fingerprint)
    layout = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
    row_type = np.dtype([("row", np.int64), ("added", np.int32), *layout])
    changed = np.flatnonzero(unsynced)
    # Rounds are ranges of row numbers, so every conflict is resolved within one round.
    cuts = np.searchsorted(changed, np.arange(0, length + _ROUND, _ROUND))
    counts = np.stack(all_gather(np.diff(cuts).astype(np.int64)))
    others = len(counts) - 1
    traffic.rows += int(counts.sum()) - len(changed)
    traffic.bytes += others * counts[0].nbytes
    for part, count in enumerate(counts.T):
        if not count.any():
            continue
        rows = changed[cuts[part] : cuts[part + 1]]
        mine = np.zeros(count.max(), row_type)  # padded: shapes must agree between ranks
        own = mine[: len(rows)]
        own["row"], own["added"] = rows, unsynced[rows]
        for name, column in columns.items():
            own[name] = column[rows]
        own["writes"] -= own["added"]  # what all ranks knew before; `_merged` adds what each rank has added
        traffic.bytes += others * mine.nbytes
        everyone = zip(all_gather(mine.view(np.uint8)), count, strict=True)
        yield _merged(np.concatenate([theirs.view(row_type)[:n] for theirs, n in everyone]))


def _merged(news: Array) -> Array:
    """Merge duplicate rows, given in rank order: the highest rank wins, `writes` are summed."""
    # Reversed, because np.unique returns the first of equal numbers.
    _, place, which = np.unique(news["row"][::-1], return_index=True, return_inverse=True)
    merged = news[::-1][place]
    np.add.at(merged["writes"], which, news["added"][::-1])
    return merged


def _refuse_different_tables(length: int, regions: int, fingerprint: str) -> None:
    digest = int.from_bytes(hashlib.sha256(fingerprint.encode()).digest()[:7], "big")
    tables = np.stack(all_gather(np.array([length, regions, digest], np.int64)))
    if (tables != tables[0]).any():
        raise ValueError(
            f"The ranks hold different RegionTables ((rows, regions) per rank: {tables[:, :2].tolist()}, "
            f"{len(set(tables[:, 2].tolist()))} fingerprint(s)); build all of them from the same index."
        )


def check_equal(columns: Columns) -> None:
    """Compare columns of all ranks by checksum: a ValueError on every rank names what differs. Collective."""
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
