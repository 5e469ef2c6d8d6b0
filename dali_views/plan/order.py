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

The permutation is stored nowhere: it is computed where it is asked for, so that the rows of a batch cost
the same of a thousand samples as of a billion.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from . import rng

Rows = NDArray[np.int64]

_NO_SAMPLE = -1  # sets the keys of an epoch's order apart from those of its views
_LEAST_TURNS = 4
_ERROR_BITS = 16


def rows(positions: Rows, length: int, seed: int, epoch: int, shuffle: bool = True) -> Rows:
    """The samples at positions (B,) of an epoch, shape (B,); both lie in [0, length).

    The positions lie on a grid as nearly square as can be. A turn shifts each of its columns, then each
    of its lines, round by a random amount, which is a Feistel network on two numbers. The grid may have
    more places than there are samples: what lands on one of these goes on until it lands elsewhere. Both
    after Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
    """
    if not shuffle:
        return positions
    side = math.isqrt(length - 1) + 1
    # Shifts in a circle of odd length are even permutations; with both odd, the others would not occur.
    height = max(2, side - side % 2)
    width = -(-length // height)
    keys = rng.keys(seed, epoch, _NO_SAMPLE, np.arange(2 * _turns(height, width))).reshape(-1, 2)
    places = _turned(positions.astype(np.uint64), height, width, keys)
    while len(beyond := np.flatnonzero(places >= length)):
        places[beyond] = _turned(places[beyond], height, width, keys)
    return places.astype(np.int64)


def _turns(height: int, width: int) -> int:
    """How many turns leave no trace of the grid.

    In a turn, two samples of one line or column remain so with a probability of 1 / height or 1 / width at
    most; all turns together leave 2^-16 of it. Where several permutations are made, more than three turns
    (six rounds) are advised for a grid of any size: Patarin, "Generic attacks on Feistel schemes", ASIACRYPT
    2001.
    """
    bits = max(2, min(height, width)).bit_length() - 1
    return max(_LEAST_TURNS, -(-_ERROR_BITS // bits))


def _turned(places: rng.Keys, height: int, width: int, keys: rng.Keys) -> rng.Keys:
    """Where the places (B,) of the grid are after a turn for each pair of keys (turns, 2)."""
    h, w = np.uint64(height), np.uint64(width)
    line, column = np.divmod(places, w)
    for down, along in keys:
        line = (line + rng.bits(down, column) % h) % h
        column = (column + rng.bits(along, line) % w) % w
    return line * w + column


def steps(length: int, global_batch: int, drop_last: bool) -> int:
    """Number of global batches in `length` samples."""
    return length // global_batch if drop_last else -(-length // global_batch)


def rank_slice(position: int, length: int, global_batch: int, rank: int, world: int) -> Rows:
    """The positions, at most global_batch / world, of `rank` in the global batch from `position` on."""
    count = max(min(global_batch, length - position), world)
    first, last = (-(-count * r // world) for r in (rank, rank + 1))
    return np.arange(position + first, position + last) % length
