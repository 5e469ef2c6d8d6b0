"""When boxes are rewritten, and what is said when they do not guide."""

from __future__ import annotations

import warnings

import numpy as np

from dali_views import RegionTable

from .. import config as cfg

__all__ = ["WIDE", "boxes_due", "outlook", "warn_if_wide"]

WIDE = 0.9  # median share of the image above which boxes say nothing


def boxes_due(epoch: int, epochs: int, warmup: int, interval: int) -> bool:
    """Whether boxes are rewritten after `epoch`, counted from 1, of `epochs` (ContrastiveCrop's code).

    From the end of the warm-up on, at multiples of the interval, but not after the last epoch.
    """
    return epoch >= warmup and epoch % interval == 0 and epoch != epochs


def outlook(config: cfg.Config) -> str:
    """When the crops of a run will begin to follow boxes, for whoever starts it; empty if never meant to."""
    crop, guide = config.views.crop, config.box_guide
    if crop not in ("contrastive", "inside"):
        return ""
    key = "guide" if guide is config.guide else "guide.boxes"
    if isinstance(guide, cfg.NoGuide):
        return f"{crop} crops, but {key}.name none writes no boxes: all crops stay random"
    if not isinstance(guide, cfg.Localised):
        return f"{crop} crops in the boxes of {guide.name} from the start"
    epochs = config.run.epochs
    due = (n for n in range(1, epochs + 1) if boxes_due(n, epochs, guide.warmup, guide.interval))
    if first := next(due, None):
        return f"{crop} crops in the boxes of {guide.name} after epoch {first} of {epochs}; random until then"
    return (
        f"{crop} crops, but with {key}.warmup {guide.warmup} and {key}.interval {guide.interval} "
        f"{guide.name} writes no boxes in {epochs} epochs: all crops stay random"
    )


def warn_if_wide(regions: RegionTable) -> None:
    """Warn when the median box is nearly the whole image."""
    areas = np.prod(regions.boxes[:, 0, 2:] - regions.boxes[:, 0, :2], axis=1)
    if np.median(areas) > WIDE:
        warnings.warn(
            f"half of the boxes cover more than {WIDE:.0%} of their image, so they hardly guide; "
            "raise guide.threshold or look at the heatmaps",
            stacklevel=2,
        )
