"""What a region table looks like once a guide has written it: numbers that tell whether it still guides."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from dali_views import RegionTable, SampleIndex
from dali_views.maps.coordinates import iou
from dali_views.regions import Snapshot

from ..evaluate.localisation import localisation, spread_rows

__all__ = ["box_areas", "health", "heaviest"]


def box_areas(regions: RegionTable) -> npt.NDArray[np.float32]:
    """(N,) share of the image that the box of greatest weight covers."""
    best = heaviest(regions)
    return np.asarray(np.prod(best[:, 2:] - best[:, :2], axis=1), np.float32)


def heaviest(regions: RegionTable, rows: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float32]:
    """(R, 4) the box of greatest weight of each of R rows, by default of all."""
    rows = np.arange(len(regions)) if rows is None else rows
    return np.asarray(regions.boxes[rows, regions.weights[rows].argmax(1)])


def health(regions: RegionTable, before: Snapshot, index: SampleIndex) -> dict[str, float]:
    """Measures of a table of an index's samples that has just been written, beside what it was before.

    Returns:
        area_low, area_median, area_high: quantiles (0.1, 0.5, 0.9) of the boxes' shares of their images;
            a median above 0.9 hardly guides.
        moved: mean of 1 - IoU of old and new boxes, over rows that had boxes; left out if none had.
        whole: share of boxes that are the whole image, which is what a map without contrast gives.
        weight_entropy: mean entropy of a row's weights over log K; 1 is all regions alike, 0 only one in use.
        stale: mean number of epochs since a row was last written, over the rows that ever were.
        paired: share of samples with a partner other than themselves. All others are of boxes, and left out
            as long as none has been written.
        iou, corloc: of the boxes of greatest weight with the best-matching true ones, if the index has some
            (of 5,000 samples, evenly spread); this is what crops are drawn from.
    """
    paired = float((regions.partner != np.arange(len(regions))).mean())
    if not regions.written.any():  # by nobody but a guide of partners
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
