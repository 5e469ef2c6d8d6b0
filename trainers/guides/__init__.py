"""Guides, one file each: who writes the region table, and when; which one a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import config as cfg
from .contrastive_crop import ContrastiveCrop
from .control import Controlled
from .fixed_boxes import SimCCrop, TrueBoxes
from .frozen_boxes import FrozenBoxes
from .guide import Guide, Training
from .online_crop import OnlineCrop
from .saliency import Saliency
from .semantic_pairs import SemanticPairs

__all__ = ["GUIDES", "Guide", "Training", "build_guide"]

GUIDES: dict[str, Callable[[Any, Training], Guide]] = {
    "none": Guide, "contrastive_crop": ContrastiveCrop, "online_crop": OnlineCrop, "saliency": Saliency,
    "frozen_boxes": FrozenBoxes, "simccrop": SimCCrop, "true_boxes": TrueBoxes,
}  # fmt: skip
"""By `guide.name`: called with the guide's section of the configuration and what it guides."""


def build_guide(config: cfg.Guide, training: Training) -> Guide:
    """The guide of a configuration; semantic pairs have another guide for boxes inside."""
    if isinstance(config, cfg.SemanticPairs):
        inside = replace(training, section="guide.boxes")
        return SemanticPairs(config, training, build_guide(config.boxes, inside))
    guide = GUIDES[config.name](config, training)
    controlled = isinstance(config, cfg.Boxes) and config.control != "none"
    return Controlled(guide) if controlled else guide
