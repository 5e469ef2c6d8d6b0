"""When boxes are rewritten, and what is said when they do not guide."""

from __future__ import annotations

import warnings

import numpy as np

from dali_views import RegionTable

__all__ = ["WIDE", "boxes_due", "warn_if_wide"]

WIDE = 0.9  # median share of the image above which boxes say nothing


def boxes_due(epoch: int, epochs: int, warmup: int, interval: int) -> bool:
    """Whether boxes are rewritten after `epoch`, counted from 1, of `epochs` (ContrastiveCrop's code).

    From the end of the warm-up on, at multiples of the interval, but not after the last epoch.
    """
    return epoch >= warmup and epoch % interval == 0 and epoch != epochs


def warn_if_wide(regions: RegionTable) -> None:
    """Warn when the median box is nearly the whole image."""
    areas = np.prod(regions.boxes[:, 0, 2:] - regions.boxes[:, 0, :2], axis=1)
    if np.median(areas) > WIDE:
        warnings.warn(
            f"half of the boxes cover more than {WIDE:.0%} of their image, so they hardly guide; "
            "raise guide.threshold or look at the heatmaps",
            stacklevel=2,
        )
