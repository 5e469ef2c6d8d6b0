"""How the rows of a region table travel between ranks: only changed ones, in rounds of bounded memory."""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .collective import all_gather, world
from .region_rows import Array

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
    columns: Mapping[str, Array],
    writes: NDArray[np.int32],
    unsynced: NDArray[np.int32],
    fingerprint: str,
    traffic: Traffic,
) -> int:
    """Makes the tables of all ranks equal, in place; a collective call on the default process group.

    Without torch.distributed, or in a world of one, only `unsynced` is cleared.

    Args:
        columns: Arrays of N rows; of a row that several ranks changed, the highest rank's wins.
        writes: (N,) counts, which add up over the ranks.
        unsynced: (N,) the part of `writes` that the other ranks do not know of; zero afterwards.
        fingerprint: Of the data set the rows belong to.
        traffic: Is added to.

    Returns:
        Number of rows received from other ranks.

    Raises:
        ValueError: On every rank, if the tables differ in length, regions or fingerprint.
    """
    if world() == 1:
        unsynced[:] = 0
        return 0
    began = time.perf_counter()
    length, regions = columns["weights"].shape
    _refuse_different_tables(length, regions, fingerprint)
    layout = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
    row_type = np.dtype([("row", np.int64), ("base", np.int32), ("added", np.int32), *layout])
    # Rounds are ranges of row numbers, so every conflict is settled within one round.
    changed = np.flatnonzero(unsynced)
    cuts = np.searchsorted(changed, np.arange(0, length + _SYNC_ROWS, _SYNC_ROWS))
    counts = np.stack(all_gather(np.diff(cuts).astype(np.int64)))
    others = len(counts) - 1
    traffic.bytes += others * counts[0].nbytes
    for part, count in enumerate(counts.T):
        if not count.any():
            continue
        rows = changed[cuts[part] : cuts[part + 1]]
        mine = np.zeros(count.max(), row_type)  # padded, as shapes must agree
        filled = mine[: len(rows)]
        filled["row"], filled["base"], filled["added"] = rows, writes[rows] - unsynced[rows], unsynced[rows]
        for name, column in columns.items():
            filled[name] = column[rows]
        traffic.bytes += others * mine.nbytes
        everyone = zip(all_gather(mine.view(np.uint8)), count, strict=True)
        news = np.concatenate([packed.view(row_type)[:n] for packed, n in everyone])
        # In rank order: where a row repeats, the highest rank's is assigned last.
        for name, column in columns.items():
            column[news["row"]] = news[name]
        writes[news["row"]] = news["base"]
        np.add.at(writes, news["row"], news["added"])
        unsynced[news["row"]] = 0
    received = int(counts.sum()) - len(changed)
    traffic.rows += received
    traffic.seconds += time.perf_counter() - began
    return received


def check_equal(columns: Mapping[str, Array]) -> None:
    """Compares the columns of all ranks by checksum; a collective call, on contiguous arrays.

    Raises:
        ValueError: On every rank, if a column differs; the message names columns and ranks.
    """
    if world() == 1:
        return
    sums = np.stack(all_gather(np.array([zlib.crc32(column.data) for column in columns.values()], np.int64)))
    unlike = sums != sums[0]
    if unlike.any():
        names = [name for name, differs in zip(columns, unlike.any(0), strict=True) if differs]
        ranks = np.flatnonzero(unlike.any(1)).tolist()
        raise ValueError(
            f"The RegionTables of ranks {ranks} differ from rank 0's in {', '.join(names)}; call sync() "
            "after update(), or write the same rows on all ranks."
        )


def _refuse_different_tables(length: int, regions: int, fingerprint: str) -> None:
    digest = int.from_bytes(hashlib.sha256(fingerprint.encode()).digest()[:7], "big")
    tables = np.stack(all_gather(np.array([length, regions, digest], np.int64)))
    if (tables != tables[0]).any():
        raise ValueError(
            f"The ranks hold different RegionTables ((rows, regions) per rank: {tables[:, :2].tolist()}, "
            f"{len(set(tables[:, 2].tolist()))} fingerprint(s)); build all of them from the same index."
        )
