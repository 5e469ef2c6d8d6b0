"""How the rows of a region table travel between ranks: only changed ones, in rounds of bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .region_rows import Array

_SYNC_ROWS = 1 << 17  # rows of the table covered by one round; bounds the memory of exchange()


def exchange(
    columns: Mapping[str, Array], writes: NDArray[np.int32], unsynced: NDArray[np.int32], fingerprint: str
) -> int:
    """Makes the tables of all ranks equal, in place; a collective call on the default process group.

    Without torch.distributed, or in a world of one, only `unsynced` is cleared.

    Args:
        columns: Arrays of N rows; of a row that several ranks changed, the highest rank's wins.
        writes: (N,) counts, which add up over the ranks.
        unsynced: (N,) the part of `writes` that the other ranks do not know of; zero afterwards.
        fingerprint: Of the data set the rows belong to.

    Returns:
        Number of rows received from other ranks.

    Raises:
        ValueError: On every rank, if the tables differ in length, regions or fingerprint.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        unsynced[:] = 0
        return 0
    length, regions = columns["weights"].shape
    _refuse_different_tables(length, regions, fingerprint)
    layout = [(name, column.dtype, column.shape[1:]) for name, column in columns.items()]
    row_type = np.dtype([("row", np.int64), ("base", np.int32), ("added", np.int32), *layout])
    # Rounds are ranges of row numbers, so every conflict is settled within one round.
    changed = np.flatnonzero(unsynced)
    cuts = np.searchsorted(changed, np.arange(0, length + _SYNC_ROWS, _SYNC_ROWS))
    counts = np.stack(_all_gather(np.diff(cuts).astype(np.int64)))
    for part, count in enumerate(counts.T):
        if not count.any():
            continue
        rows = changed[cuts[part] : cuts[part + 1]]
        mine = np.zeros(count.max(), row_type)  # padded, as shapes must agree
        filled = mine[: len(rows)]
        filled["row"], filled["base"], filled["added"] = rows, writes[rows] - unsynced[rows], unsynced[rows]
        for name, column in columns.items():
            filled[name] = column[rows]
        everyone = zip(_all_gather(mine.view(np.uint8)), count, strict=True)
        news = np.concatenate([packed.view(row_type)[:n] for packed, n in everyone])
        # In rank order: where a row repeats, the highest rank's is assigned last.
        for name, column in columns.items():
            column[news["row"]] = news[name]
        writes[news["row"]] = news["base"]
        np.add.at(writes, news["row"], news["added"])
        unsynced[news["row"]] = 0
    return int(counts.sum() - counts[dist.get_rank()].sum())


def _refuse_different_tables(length: int, regions: int, fingerprint: str) -> None:
    digest = int.from_bytes(hashlib.sha256(fingerprint.encode()).digest()[:7], "big")
    tables = np.stack(_all_gather(np.array([length, regions, digest], np.int64)))
    if (tables != tables[0]).any():
        raise ValueError(
            f"The ranks hold different RegionTables ((rows, regions) per rank: {tables[:, :2].tolist()}, "
            f"{len(set(tables[:, 2].tolist()))} fingerprint(s)); build all of them from the same index."
        )


def _all_gather(array: Array) -> list[Array]:
    """The array of every rank, in rank order; shapes must agree."""
    import torch
    import torch.distributed as dist

    # A mixed "cpu:gloo,cuda:nccl" group takes CPU tensors; NCCL alone does not.
    backend = str(dist.get_backend())
    device = f"cuda:{torch.cuda.current_device()}" if "nccl" in backend and "gloo" not in backend else "cpu"
    mine = torch.from_numpy(array).to(device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [tensor.cpu().numpy() for tensor in everyone]
