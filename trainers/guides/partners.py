"""Semantic partners: for each image another one of similar content (arXiv 2306.16122), and controls.

Of the paper's search we know only this: a pre-trained encoder and a measure of similarity choose the pairs,
without labels. The band of cosines, the single best partner and all numbers here are our choice.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dali_views.plan import rng

from ..engine import ranks

__all__ = ["Partners", "find_partners", "label_partners", "precision", "random_partners"]

PAIRS = 10_000_000
"""Random pairs that quantiles of the cosine are estimated from."""
_BEYOND = 10  # of them must lie beyond a quantile: then its share is known to about a third
_BUDGET = 2**30  # bytes of a tile
_STREAM = 0x7061  # separates these random numbers from those of the loader


class Partners(NamedTuple):
    """The pairs; equal on all ranks."""

    partner: Tensor  # (N,) int64, row of the partner; the image itself if it has none
    cosine: Tensor  # (N,) float32, of the two; NaN where there is no partner
    band: tuple[float, float]  # least and greatest cosine, as absolute values


@torch.no_grad()
def find_partners(
    features: Tensor, *, band: tuple[float, float], kind: Literal["absolute", "quantile"] = "absolute",
    anchors: Tensor | None = None, chunk: int | None = None, pairs: int = PAIRS, seed: int = 0,
    progress: bool = True,
) -> Partners:  # fmt: skip
    """The most similar other image of every anchor among those whose cosine lies inside a band.

    The upper bound excludes (near-)duplicates. Among equally similar images the first is taken. Features are
    compared in float32, a tile of C anchors and C images at a time: beside them, memory is at most
    7 C^2 + 16 C D bytes, about 60 bytes per image and, for quantiles, 24 per random pair. The ranks share the
    anchors; 2 A N D operations are 6.7e15 for all of ImageNet at D = 2048.

    Args:
        features: (N, D), float of any width and scale, equal on all ranks. A row of zeros has no cosine, so
            it has no partner and is none.
        band: least and greatest cosine, both included.
        kind: "absolute", cosines; or "quantile", quantiles in [0, 1] of the cosine of two random images,
            because the range of cosines depends on the encoder. 0 and 1 mean no bound. They are estimated
            from `pairs` random pairs, or exactly if there are no more, and need at least 10 pairs beyond
            them: with ten million, none closer to 0 or 1 than 1e-6.
        anchors: (A,) rows to find partners for; default all. The others stay alone.
        chunk: C; by default a tile takes 1 GB.

    Raises:
        ValueError: features that are not finite, or a band that is none or that the pairs cannot resolve.
    """
    n, device = len(features), features.device
    wanted = torch.arange(n, device=device) if anchors is None else anchors.to(device)
    wide = 16 * features.shape[1]
    # The largest C with 7 C^2 + 16 C D bytes: float32 cosines and three masks, features in and out.
    chunk = min(n, chunk or max(1, int((math.sqrt(wide**2 + 28 * _BUDGET) - wide) / 14)))
    if not all(bool(torch.isfinite(part).all()) for part in torch.split(features, chunk)):
        raise ValueError("some features are not finite; find the images or the layer that they come from")
    low, high = _absolute(features, band, kind, pairs, seed, max(1, chunk // 2))
    # Rounding may take the cosine of two equal rows beyond 1.
    least, most = low if low > -1 else -math.inf, high if high < 1 else math.inf

    rank, world = ranks.rank(), ranks.world()
    mine = wanted[rank::world]
    best = torch.full((len(mine),), -math.inf, device=device)
    found = mine.clone()
    tiles = -(-n // chunk) * -(-len(mine) // chunk)
    silent = not (progress and ranks.is_main())
    with tqdm(total=tiles, desc="partners", unit="tile", disable=silent or None) as bar:
        for first in range(0, n, chunk):
            others = _unit(features[first : first + chunk])
            columns = torch.arange(first, first + len(others), device=device)
            for begin in range(0, len(mine), chunk):
                part = slice(begin, begin + chunk)
                cosines = _unit(features[mine[part]]) @ others.T
                inside = (cosines >= least) & (cosines <= most)  # False for NaN
                inside &= columns != mine[part, None]
                value, place = cosines.masked_fill_(~inside, -math.inf).max(dim=1)
                better = value > best[part]  # not >=, so that the first of equals stays
                best[part] = torch.where(better, value, best[part])
                found[part] = torch.where(better, place + first, found[part])
                bar.update()
    rows, found, best = (ranks.gather_rows(each) for each in (mine, found, best))
    partner = torch.arange(n, device=device)
    partner[rows] = found
    cosine = torch.full((n,), math.nan, device=device)
    cosine[rows] = torch.where(found == rows, math.nan, best.clamp(-1, 1))
    return Partners(partner, cosine, (low, high))


def _unit(features: Tensor) -> Tensor:
    """Rows of length 1 in float32; a row of zeros becomes NaN, which lies in no band."""
    rows = features.float()
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def _absolute(
    features: Tensor, band: tuple[float, float], kind: str, pairs: int, seed: int, chunk: int
) -> tuple[float, float]:
    """The band as cosines."""
    low, high = (float(bound) for bound in band)
    floor = 0 if kind == "quantile" else -1
    if not floor <= low < high <= 1:
        raise ValueError(f"a band of kind {kind} is {floor} <= low < high <= 1, not {(low, high)}")
    if kind == "absolute":
        return low, high
    n = len(features)
    everyone = n * (n - 1) // 2
    count = min(everyone, pairs)
    for bound in (low, high):
        tail = min(bound, 1 - bound)
        if tail and round(count * tail, 3) < _BEYOND:  # rounded, for 1 - 0.9999 is less than 0.0001
            raise ValueError(
                f"the quantile {bound} cannot be estimated from {count} pairs: fewer than {_BEYOND} lie "
                "beyond it; take one nearer 0.5, or give an absolute band"
            )
    if count == everyone:
        one, other = torch.triu_indices(n, n, 1)
    else:
        draw = torch.Generator().manual_seed(seed)
        one = torch.randint(n, (count,), generator=draw)
        other = (one + 1 + torch.randint(n - 1, (count,), generator=draw)) % n
    share = slice(ranks.rank(), None, ranks.world())
    sides = (torch.split(side[share].to(features.device), chunk) for side in (one, other))
    cosines = [(_unit(features[i]) * _unit(features[j])).sum(dim=1) for i, j in zip(*sides, strict=True)]
    known = ranks.gather_rows(torch.cat(cosines)).cpu().numpy()
    known = known[~np.isnan(known)]
    if not len(known):
        raise ValueError("all features are zeros, so their cosines have no quantiles; check the encoder")
    quantiles = np.quantile(known, (low, high)).clip(-1, 1).tolist()
    return quantiles[0] if low > 0 else -1.0, quantiles[1] if high < 1 else 1.0


def random_partners(n: int, seed: int, anchors: Tensor | None = None) -> Tensor:
    """The control that must hurt: any other image, all equally likely. As `label_partners` with one label."""
    return label_partners(torch.zeros(n, dtype=torch.long), seed, anchors)


def label_partners(
    labels: Tensor | NDArray[np.integer[Any]], seed: int, anchors: Tensor | None = None
) -> Tensor:
    """The control that knows the answer: any other image of the same label, all equally likely.

    Args:
        labels: (N,), -1 where unknown.
        anchors: (A,) rows that get a partner, independent of the other anchors; default all.

    Returns:
        (N,) int64 on the CPU; the row itself if its label is unknown or unique.
    """
    label = torch.as_tensor(labels).cpu().numpy()
    _, group, sizes = np.unique(label, return_inverse=True, return_counts=True)
    members = np.argsort(group, kind="stable")  # group by group
    place = np.empty(len(label), np.int64)
    place[members] = np.arange(len(label))
    start, others = (np.cumsum(sizes) - sizes)[group], sizes[group] - 1
    rows = np.arange(len(label)) if anchors is None else anchors.cpu().numpy()
    rows = rows[(label[rows] >= 0) & (others[rows] > 0)]
    step = 1 + (rng.uniform(rng.keys(seed, _STREAM, rows), 0) * others[rows]).astype(np.int64)
    partner = np.arange(len(label))
    partner[rows] = members[start[rows] + (place[rows] - start[rows] + step) % (others[rows] + 1)]
    return torch.from_numpy(partner)


def precision(
    partner: Tensor, labels: Tensor | NDArray[np.integer[Any]], cosine: Tensor | None = None, bands: int = 10
) -> dict[str, Any]:
    """How many partners are of the same class: to judge a search, never to train.

    Pairs are images with another image as their partner, where both labels are known (not -1).

    Args:
        partner, labels, cosine: (N,), as `find_partners` returns them.
        bands: number of equal parts into which the pairs are sorted by similarity.

    Returns:
        "precision", the share of pairs with equal labels; "pairs", their number; "chance", that share for
        random partners of the same images; and with `cosine` "bands", a list of {"low", "high",
        "precision", "pairs"} by ascending similarity. Unknown values are NaN.
    """
    who, label = partner.cpu(), torch.as_tensor(labels).long().cpu()
    asked = (who != torch.arange(len(who))) & (label >= 0) & (label[who] >= 0)
    right = (label[who] == label)[asked].double()
    known = label[label >= 0]
    alike = (torch.bincount(known)[label[asked]] - 1).double()
    found: dict[str, Any] = {"precision": float(right.mean()), "pairs": len(right)}
    found["chance"] = float(alike.mean() / (len(known) - 1)) if len(right) else math.nan
    if cosine is not None:
        similarity = cosine.cpu()[asked].double()
        found["bands"] = [
            {
                "low": float(similarity[part[0]]) if len(part) else math.nan,
                "high": float(similarity[part[-1]]) if len(part) else math.nan,
                "precision": float(right[part].mean()),
                "pairs": len(part),
            }
            for part in similarity.argsort(stable=True).tensor_split(bands)
        ]
    return found
