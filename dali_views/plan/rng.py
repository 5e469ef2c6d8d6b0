"""Counter-based random numbers: a value is a pure function of its key and slot, never of a call order.

A generator with state would make a view depend on the batch, rank or thread that draws it. Here each (seed,
epoch, sample, view) hashes to a 64-bit key, and slot `s` of a key is the `s`-th output of SplitMix64 (Steele,
Lea, Flood, OOPSLA 2014) started there. All functions are vectorised over keys.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Keys = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


def _mix(z: Keys) -> Keys:
    """SplitMix64's finaliser: a bijection of 64-bit words that flips each output bit with probability 1/2."""
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    return z ^ (z >> np.uint64(31))


def keys(*parts: ArrayLike) -> Keys:
    """Hash integer parts, broadcast against each other, to one key each.

    `keys(seed, epoch, samples[None, :], views[:, None])` has shape (V, B). The order of the parts matters;
    negative integers are allowed.
    """
    shape = np.broadcast_shapes(*(np.shape(part) for part in parts))
    state = np.zeros(shape, np.uint64)
    for part in parts:
        word = np.asarray(part, np.int64).astype(np.uint64)
        state = _mix((state ^ word) + _GOLDEN)
    return state


def bits(key: Keys, slot: ArrayLike) -> Keys:
    """64 random bits for `slot` of each key (the two broadcast)."""
    counter = np.asarray(slot, np.uint64) + np.uint64(1)
    with np.errstate(over="ignore"):  # intended; NumPy warns for scalars only
        return _mix(key + counter * _GOLDEN)


def uniform(key: Keys, slot: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits, for `slot` of each key (the two broadcast)."""
    return (bits(key, slot) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def symmetric_beta(u: NDArray[np.float64], v: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Beta(alpha, alpha) from two uniforms, in closed form and for every alpha > 0.

    Bailey's polar method gives Student's t with 2 alpha degrees of freedom; t / sqrt(2 alpha + t^2)
    is a Beta(alpha, alpha) stretched to (-1, 1) (Devroye, "Random variate generation in one line of
    code", WSC 1996). There is no rejection, so the number of uniforms does not depend on their values.
    """
    w = u ** (1.0 / alpha)
    c = np.cos((2.0 * np.pi) * v)
    spread = (1.0 - w) * c * c
    total = w + spread
    # w underflows to 0 for small alpha; with c = 0 as well the ratio would be 0/0.
    return 0.5 + 0.5 * np.sign(c) * np.sqrt(spread / np.where(total > 0.0, total, 1.0))
