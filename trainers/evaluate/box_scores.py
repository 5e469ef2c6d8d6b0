"""Scores of boxes: how well one box per image finds the true objects, and the health of a region table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dali_views import RegionTable, SampleIndex
from dali_views.maps.coordinates import iou
from dali_views.regions import Snapshot

__all__ = [
    "CENTRE", "MOST_LOCALISED", "THRESHOLDS", "WHOLE", "Localised", "best_overlap", "best_threshold",
    "box_areas", "health", "heaviest", "localisation", "reference", "spread_rows",
]  # fmt: skip

CENTRE = (0.25, 0.25, 0.75, 0.75)
WHOLE = (0.0, 0.0, 1.0, 1.0)
MOST_LOCALISED = 5000
"""Images with true boxes that are enough for a mean."""
THRESHOLDS = tuple(level / 10 for level in range(1, 10))
"""Shares of a map at which boxes are tried."""


def spread_rows(count: int, most: int = MOST_LOCALISED) -> npt.NDArray[np.int64]:
    """Rows, ascending, of at most so many of `count` samples, evenly spread."""
    return np.linspace(0, count - 1, min(most, count)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Localised:
    """Where an encoder sees the object in each of N images."""

    index: SampleIndex
    boxes: npt.NDArray[np.float32]  # (N, 4), at the threshold
    overlap: npt.NDArray[np.float64]  # (N,) IoU with the best-matching true box, NaN where there is none
    threshold: float


def best_overlap(boxes: npt.NDArray[np.floating[Any]], index: SampleIndex) -> npt.NDArray[np.float64]:
    """(N,) IoU of boxes (N, 4) with the best-matching true box of each image, NaN where it has none."""
    truths = [index.truth(i) for i in range(len(index))]
    counts = np.array([len(true) for true in truths], dtype=np.int64)
    best = np.full(len(index), np.nan)
    if counts.any():
        true = torch.from_numpy(np.concatenate(truths))
        overlaps = iou(torch.from_numpy(boxes.repeat(counts, 0)), true).double().numpy()
        best[counts > 0] = np.maximum.reduceat(overlaps, (counts.cumsum() - counts)[counts > 0])
    return best


def localisation(boxes: npt.ArrayLike, index: SampleIndex) -> dict[str, float]:
    """Score one box per image against the true boxes; images without true boxes are skipped.

    Args:
        boxes: (N, 4) as (y0, x0, y1, x1) fractions of the image, row i for image i of the index.

    Returns:
        images: how many were scored.
        iou_best: mean IoU with the best-matching true box.
        corloc: share of images whose best IoU is at least 0.5 (Deselaers et al. 2010).
        Both are NaN if no image has true boxes.
    """
    best = best_overlap(np.asarray(boxes, dtype=np.float64), index)
    best = best[~np.isnan(best)]
    if not len(best):
        return {"images": 0, "iou_best": np.nan, "corloc": np.nan}
    return {"images": len(best), "iou_best": float(best.mean()), "corloc": float((best >= 0.5).mean())}


def best_threshold(
    boxes: npt.NDArray[np.floating[Any]], index: SampleIndex, thresholds: Sequence[float] = THRESHOLDS
) -> dict[str, float]:
    """Scores at the threshold of greatest mean IoU: what a map is worth, whatever threshold a guide has.

    As in MaxBoxAcc (Choe et al., arXiv 2001.07437), the true boxes choose the threshold, so that maps of
    different ranges compare; it is an upper bound for a guide, which does not see true boxes.

    Args:
        boxes: (T, N, 4), those of N images at each threshold.

    Returns:
        As `localisation`, with "threshold", the chosen one, and "area", the median share of the image that
        its boxes cover.
    """
    scores = [localisation(each, index) for each in boxes]
    best = int(np.argmax([score["iou_best"] for score in scores]))
    area = float(np.median(np.prod(boxes[best][:, 2:] - boxes[best][:, :2], axis=1)))
    return {**scores[best], "threshold": thresholds[best], "area": area}


def reference(index: SampleIndex) -> dict[str, dict[str, float]]:
    """Scores of three boxes that do not depend on the image.

    "centre" is the centre half, "whole" the whole image, and "random" a crop of 0.2 to 1 of the area and of
    ratio 3/4 to 4/3 at a random place, drawn for each image.
    """
    n, draw = len(index), np.random.default_rng(0)
    area, ratio = draw.uniform(0.2, 1, n), np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3), n))
    shape = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=1).clip(max=1)
    start = draw.uniform(size=(n, 2)) * (1 - shape)
    boxes = {
        "centre": np.tile(CENTRE, (n, 1)),
        "whole": np.tile(WHOLE, (n, 1)),
        "random": np.concatenate([start, start + shape], axis=1),
    }
    return {name: localisation(box, index) for name, box in boxes.items()}


def box_areas(regions: RegionTable) -> npt.NDArray[np.float32]:
    """(N,) share of the image that the box of greatest weight covers."""
    best = heaviest(regions)
    return np.asarray(np.prod(best[:, 2:] - best[:, :2], axis=1), np.float32)


def heaviest(regions: RegionTable, rows: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float32]:
    """(R, 4) the box of greatest weight of each of R rows, by default of all."""
    rows = np.arange(len(regions)) if rows is None else rows
    return np.asarray(regions.boxes[rows, regions.weights[rows].argmax(1)])


def health(regions: RegionTable, before: Snapshot, index: SampleIndex) -> dict[str, float]:
    """Measures of a region table that a guide has just written: whether it still guides.

    Returns:
        area_low, area_median, area_high: quantiles (0.1, 0.5, 0.9) of the boxes' shares of their images;
            a median above 0.9 hardly guides. A row without a box counts as the whole image.
        moved: mean of 1 - IoU of old and new boxes, over rows that had boxes; absent if none had.
        whole: share of boxes that are the whole image, which is what a map without contrast gives.
        weight_entropy: mean entropy of a row's weights over log K; 1: all regions alike, 0: one in use.
        stale: mean number of epochs since a row was last written, over the rows that ever were.
        paired: share of samples with another sample as partner. If only partners are written, it is all.
        iou, corloc: of the boxes of greatest weight, which crops are drawn from, with the best-matching true
            ones, if the index has some (5,000 samples, evenly spread).
    """
    paired = float((regions.partner != np.arange(len(regions))).mean())
    if paired and not regions.written.any():  # only partners are written
        return {"paired": paired}
    areas = box_areas(regions)
    low, median, high = np.quantile(areas, [0.1, 0.5, 0.9])
    old = before.written
    moved = 1 - iou(torch.from_numpy(regions.boxes[old, 0]), torch.from_numpy(before.boxes[old, 0]))
    written = regions.written_epoch >= 0
    found = {
        "area_low": low,
        "area_median": median,
        "area_high": high,
        "moved": float(moved.mean()) if old.any() else np.nan,
        "whole": float((areas > 1 - 1e-6).mean()),
        "weight_entropy": _entropy(regions.weights),
        "stale": float((regions.epoch - regions.written_epoch[written]).mean()) if written.any() else np.nan,
        "paired": paired,
    }
    if len(index.boxes):
        rows = spread_rows(len(index))
        placed = localisation(heaviest(regions, rows), index.subset(rows))
        found |= {"iou": placed["iou_best"], "corloc": placed["corloc"]}
    return {name: float(value) for name, value in found.items() if np.isfinite(value)}


def _entropy(weights: npt.NDArray[np.float32]) -> float:
    if weights.shape[1] == 1:
        return 0.0
    shares = weights / weights.sum(1, keepdims=True)
    terms = np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0)
    return float(-terms.sum(1).mean() / np.log(weights.shape[1]))
