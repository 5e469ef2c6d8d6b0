"""Guides: who writes the region table, and when; one file each."""

from __future__ import annotations

import torch

from dali_views import SampleIndex

from .. import config as cfg
from ..methods import Method
from .contrastive_crop import ContrastiveCrop
from .fixed_boxes import SimCCrop, TrueBoxes
from .guide import Guide
from .online_crop import OnlineCrop
from .saliency import Saliency
from .semantic_pairs import SemanticPairs

__all__ = ["Guide", "build_guide"]


def build_guide(config: cfg.Config, method: Method, index: SampleIndex, device: torch.device) -> Guide:
    """The guide of a configuration.

    Raises:
        ValueError: the guide wants something that the data or the network do not have.
    """
    boxes = _box_guide(config, config.box_guide, method, index, device)
    if isinstance(config.guide, cfg.SemanticPairs):
        return SemanticPairs(config, config.guide, boxes, index, device)
    return boxes


def _box_guide(
    config: cfg.Config, guide: cfg.BoxGuide, method: Method, index: SampleIndex, device: torch.device
) -> Guide:
    match guide:
        case cfg.NoGuide():
            return Guide()
        case cfg.ContrastiveCrop():
            return ContrastiveCrop(config, guide, method, index, device)
        case cfg.OnlineCrop():
            return OnlineCrop(config, guide, method, index, device)
        case cfg.Saliency():
            return Saliency(config, guide, method, index, device)
        case cfg.SimCCrop():
            return SimCCrop(guide)
        case cfg.TrueBoxes():
            return TrueBoxes(index)
