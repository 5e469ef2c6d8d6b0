"""The order of an epoch: a pure function of (seed, epoch, length, global batch, rank, world).

The epoch is one permutation of all samples. Each step takes the next global batch of it, and each rank a
contiguous slice of that batch: the number of ranks changes which rank sees a sample, never the step.
Positions in the permutation of 14 samples, global batch 8, four ranks:

    position   0  1 | 2  3 | 4  5 | 6  7 || 8  9 | 10 | 11 12 | 13
    rank         0      1      2      3       0     1     2      3
    step                    0             || 1, only with drop_last=False

With `drop_last=False` the rest is divided as evenly as possible. If the rest has fewer samples than there are
ranks, the last ranks take samples from the beginning of the epoch: every rank has the same number of steps.
Collect results by `Batch.index`, where a repeated sample does no harm.

The permutation is computed, not stored: the rows of a batch cost the same for a thousand samples and for a
billion.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from . import rng

Rows = NDArray[np.int64]

_NO_SAMPLE = -1  # in place of a sample in the keys: the order's keys differ from those of views
_LEAST_TURNS = 4
_ERROR_BITS = 16


def rows(positions: Rows, length: int, seed: int, epoch: int, shuffle: bool = True) -> Rows:
    """The samples at positions (B,) of an epoch, shape (B,); both lie in [0, length).

    The positions lie on a grid that is nearly square. A turn rotates each column, then each line, by a random
    amount: a Feistel network on two numbers. The grid may have more places than there are samples; a position
    that lands on an extra place is turned again until it lands on a sample. Both steps follow Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
    """
    if not shuffle:
        return positions
    side = math.isqrt(length - 1) + 1
    # Rotations of odd length are even permutations: with both sides odd, odd ones would not occur.
    height = max(2, side - side % 2)
    width = -(-length // height)
    keys = rng.keys(seed, epoch, _NO_SAMPLE, np.arange(2 * _turns(height, width))).reshape(-1, 2)
    places = _turned(positions.astype(np.uint64), height, width, keys)
    while len(beyond := np.flatnonzero(places >= length)):
        places[beyond] = _turned(places[beyond], height, width, keys)
    return places.astype(np.int64)


def _turns(height: int, width: int) -> int:
    """Number of turns after which the grid leaves no trace.

    A turn keeps two samples in one line or column with a probability of at most 1 / height or 1 / width; all
    turns together keep 2^-16 of them. For several permutations on a grid of any size, more than three turns
    (six rounds) are advised: Patarin, "Generic attacks on Feistel schemes", ASIACRYPT 2001.
    """
    bits = max(2, min(height, width)).bit_length() - 1
    return max(_LEAST_TURNS, -(-_ERROR_BITS // bits))


def _turned(places: rng.Keys, height: int, width: int, keys: rng.Keys) -> rng.Keys:
    """Places (B,) of the grid after one turn per pair of keys (turns, 2)."""
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
