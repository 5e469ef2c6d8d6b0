"""How well one predicted box per image finds the true objects."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from dali_views.coordinates import iou

__all__ = ["CENTRE", "WHOLE", "Truth", "localisation", "reference"]

CENTRE = (0.25, 0.25, 0.75, 0.75)
WHOLE = (0.0, 0.0, 1.0, 1.0)


class Truth(Protocol):
    """An index with ragged true boxes (a SampleIndex)."""

    def __len__(self) -> int: ...
    def truth(self, i: int, /) -> npt.NDArray[np.floating[Any]]: ...


def localisation(boxes: npt.ArrayLike, index: Truth) -> dict[str, float]:
    """Score one box per image against the true boxes; images without true boxes are skipped.

    Args:
        boxes: (N, 4) as (y0, x0, y1, x1) fractions of the image, row i for image i of the index.
        index: true boxes in the same unit.

    Returns:
        images: how many were scored.
        iou_best: mean IoU with the best-matching true box.
        iou_largest: mean IoU with the largest true box.
        corloc: share of images whose best IoU is at least 0.5 (Deselaers et al. 2010).
        The three are NaN if no image has true boxes.

    Raises:
        ValueError: the boxes are not (N, 4) with N the length of the index.
    """
    predicted = np.asarray(boxes, dtype=np.float64)
    if predicted.shape != (len(index), 4):
        raise ValueError(f"boxes should have shape ({len(index)}, 4), one per image, not {predicted.shape}")
    truths = [index.truth(i) for i in range(len(index))]
    counts = np.array([len(true) for true in truths], dtype=np.int64)
    if not counts.sum():
        return {"images": 0, "iou_best": np.nan, "iou_largest": np.nan, "corloc": np.nan}
    true = np.concatenate(truths)
    overlaps = iou(torch.from_numpy(predicted.repeat(counts, 0)), torch.from_numpy(true)).double().numpy()
    areas = np.prod(true[:, 2:] - true[:, :2], axis=1)
    starts = (counts.cumsum() - counts)[counts > 0]
    best = np.maximum.reduceat(overlaps, starts)
    largest = [overlaps[a + np.argmax(areas[a:b])] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return {
        "images": len(best),
        "iou_best": float(best.mean()),
        "iou_largest": float(np.mean(largest)),
        "corloc": float((best >= 0.5).mean()),
    }


def reference(index: Truth) -> dict[str, dict[str, float]]:
    """Scores of two boxes that look at nothing: the centre half ("centre") and the whole image ("whole")."""
    return {
        name: localisation(np.tile(box, (len(index), 1)), index)
        for name, box in (("centre", CENTRE), ("whole", WHOLE))
    }
