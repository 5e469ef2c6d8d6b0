"""Who sees which sample when: a pure function of (seed, epoch, length, global batch, rank, world).

The epoch is one permutation of all samples. Step `s` takes the next global batch of it and every rank
a contiguous slice of that, so the number of ranks changes who sees a sample but never at which step.
Seven samples, global batch 4, two ranks (a to g already permuted):

    step            0       1 (drop_last=False)   1 (drop_last=True)
    rank 0        a b       e f                   -
    rank 1        c d       g                     -

With `drop_last=False` the rest is shared out as evenly as can be. If it has fewer samples than there are
ranks, the ranks left over take samples from the beginning of the epoch, so that every rank has the same
number of steps; whoever collects results does so by `Batch.index`, where a repeat is harmless.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def permutation(length: int, seed: int, epoch: int, shuffle: bool = True) -> Rows:
    """All samples in the order of `epoch`, shape (length,)."""
    if not shuffle:
        return np.arange(length, dtype=np.int64)
    # SeedSequence takes non-negative words only.
    words = [seed & 0xFFFFFFFFFFFFFFFF, epoch]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words))).permutation(length)


def steps(length: int, global_batch: int, drop_last: bool) -> int:
    """Number of global batches in `length` samples."""
    return length // global_batch if drop_last else -(-length // global_batch)


def rank_slice(order: Rows, position: int, global_batch: int, rank: int, world: int) -> Rows:
    """The rows, at most global_batch / world, of `rank` in the global batch at `position` (in samples)."""
    rows = order[position : position + global_batch]
    if len(rows) < world:
        rows = np.concatenate([rows, np.resize(order, world - len(rows))])
    return np.array_split(rows, world)[rank]
