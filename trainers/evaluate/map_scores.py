"""How well each kind of map of an encoder, and each box that looks at nothing, finds the true objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dali_views import SampleIndex
from dali_views.maps.boxes import boxes_from_maps
from dali_views.maps.coordinates import iou

from .. import config as cfg
from ..encoders.backbones import Backbone
from ..guides.image_maps import ImageMaps
from ..guides.localise import input_size, maps_of
from ..methods import Method
from .localisation import THRESHOLDS, best_threshold, localisation, reference, spread_rows

__all__ = ["map_scores", "seen_maps", "table"]


def map_scores(
    config: cfg.Config,
    network: Method | Backbone,
    index: SampleIndex,
    device: torch.device,
    seen: ImageMaps | None = None,
) -> dict[str, dict[str, float]]:
    """Scores of the boxes of every kind of map, in this process alone.

    Args:
        network: a method, or an encoder, which has no maps by gradient.
        index: with true boxes; of more than 5,000 samples so many, evenly spread, are looked at.
        seen: maps of its samples put together in training without a pass, see `OnlineCrop`.

    Returns:
        By row, `best_threshold` of each kind of map, and `localisation` and the median "area" of its boxes by
        Otsu's threshold ("KIND, otsu"); `reference` boxes. With `seen`, each row of the former also has
        "agreement", the mean IoU of boxes with those of the maps of whole images.
    """
    rows = spread_rows(len(index))
    part = index.subset(rows)
    kinds: list[cfg.MapKind] = ["activation", "principal"]
    if isinstance(network, Method):
        kinds.append("gradient")
    how = config.localise
    maps: dict[str, Tensor] = {kind: maps_of(config, network, part, device, how, kind) for kind in kinds}
    size = input_size(config, how)
    levels: tuple[float | Literal["otsu"], ...] = (*THRESHOLDS, "otsu")

    def boxes(of: Tensor) -> Tensor:
        return torch.stack([boxes_from_maps(of, level, (size, size)) for level in levels])

    at: dict[str, Tensor] = {kind: boxes(each) for kind, each in maps.items()}
    if seen is not None:
        at["online"] = boxes(seen.normalised(torch.from_numpy(rows).to(seen.maps.device)).cpu())
    scores: dict[str, dict[str, float]] = {}
    for name, each in at.items():
        otsu = each[-1].numpy()
        area = float(np.median(np.prod(otsu[:, 2:] - otsu[:, :2], axis=1)))
        scores[name] = best_threshold(each[:-1].numpy(), part)
        scores[f"{name}, otsu"] = {**localisation(otsu, part), "area": area}
    if seen is not None:
        level = THRESHOLDS.index(scores["activation"]["threshold"])
        scores["online"]["agreement"] = float(iou(at["online"][level], at["activation"][level]).mean())
        scores["online, otsu"]["agreement"] = float(iou(at["online"][-1], at["activation"][-1]).mean())
    return scores | reference(part)


def seen_maps(config: cfg.Config, saved: Mapping[str, Any], length: int) -> ImageMaps | None:
    """The maps that a checkpoint's guide has put together from views seen in training, if it has any."""
    guide, state = config.box_guide, saved["guide"]
    if not isinstance(guide, cfg.OnlineCrop):
        return None
    maps = ImageMaps(length, guide.map_size, guide.rate, torch.device("cpu"))
    maps.load_state_dict(state.get("boxes", state)["maps"])
    return maps


def table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """`map_scores` as text."""
    lines = [f"{'':18s} {'threshold':>9s} {'IoU':>7s} {'CorLoc':>8s} {'area':>6s} {'agreement':>10s}"]
    for name, row in scores.items():
        cells = [
            f"{row['threshold']:.1f}" if "threshold" in row else "",
            f"{row['iou_best']:.3f}",
            f"{100 * row['corloc']:.1f} %",
            f"{row['area']:.2f}" if "area" in row else "",
            f"{row['agreement']:.3f}" if "agreement" in row else "",
        ]
        widths = (9, 7, 8, 6, 10)
        told = " ".join(f"{cell:>{width}s}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{name:18s} {told}".rstrip())
    return "\n".join(lines)
