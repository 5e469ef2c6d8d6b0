"""JointCrop: the areas of two views of a sample are drawn together, not one by one.

Source: arXiv 2412.16522, algorithm 1 (appendix A), J-Crop(beta). Areas are shares in [low, high]; r is the
second over the first, and R = high / low.

    beta = 0    log r is uniform in [-log R, log R]
    beta > 0    log r is normal about 0 with deviation log R / beta, truncated there: views of like area
    beta < 0    log r is normal about the two ends -log R and log R instead: a large and a small view

The first area is then uniform where both fit: in [max(low, low / r), min(high, high / r)]. Two independent
areas have a ratio near 1 more often, which makes easier pairs.

Published, linear top-1 on ImageNet (appendices D and G, and the page of the code), at beta = 0: MoCo v1
57.25 -> 60.87, where ContrastiveCrop has 58.34, and JointCrop with ContrastiveCrop's law of centres but not
its boxes 61.33; MoCo v3 68.9 -> 69.47 in 100 epochs, 72.8 -> 73.23 in 300. DINO with two global and four
local views, beta not stated: 66.36 -> 66.55 for the global pair.

Ours: the second argument of the paper's truncated normal is read as its deviation (the public code has
beta = 0 alone); areas of `"inside"` crops are shares of the box; a crop whose ten ratios all fail is
torchvision's central one (public code: the whole image). The public code has log(R - 0.1) for log R.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from . import rng
from .views import View

F64 = NDArray[np.float64]

_PAIR_VIEW = -2  # view number in the key of a pair: -2 for views 0 and 1, -3 for views 2 and 3, ...


def joint_shares(
    view: View, rows: NDArray[np.int64], numbers: Sequence[int], seed: int, epoch: int
) -> F64 | None:
    """(V * B,) areas of the V views of these numbers, which equal `view`, of samples (B,), as shares.

    None if the view draws its area by itself. The key of a draw is (seed, epoch, sample, pair): areas do not
    depend on boxes, nor on the crops.
    """
    if view.joint is None:
        return None
    number = np.array(numbers)[:, None]
    keys = rng.keys(seed, epoch, rows[None, :], _PAIR_VIEW - number // 2)
    return np.where(number % 2 == 0, *pair_shares(keys, view.joint, view.scale)).ravel()


def pair_shares(keys: rng.Keys, beta: float, scale: tuple[float, float]) -> tuple[F64, F64]:
    """Shares of the first and of the second view of pairs, each of the shape of `keys` and within `scale`."""
    low, high = scale
    chance, place = _ratio_law(beta)
    ratio = (high / low) ** np.interp(rng.uniform(keys, 0), chance, place)
    least, most = np.maximum(low, low / ratio), np.minimum(high, high / ratio)
    first = least + (most - least) * rng.uniform(keys, 1)
    return np.clip(first, low, high), np.clip(first * ratio, low, high)


@cache
def _ratio_law(beta: float) -> tuple[F64, F64]:
    """Nodes of the distribution function of log r / log R: probabilities, and values in [-1, 1]."""
    place = np.linspace(-1.0, 1.0, 1025)
    distance = np.abs(place) if beta > 0.0 else 1.0 - np.abs(place)
    density = np.exp(-0.5 * (beta * distance) ** 2)
    chance = np.append(0.0, np.cumsum(density[1:] + density[:-1]))
    return chance / chance[-1], place
