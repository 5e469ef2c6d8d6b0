"""Guides: who writes the region table, and when; one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dali_views import Batch, RegionTable, SampleIndex

from .. import config as cfg
from ..methods import Method

__all__ = ["Guide", "build_guide"]


class Guide:
    """Nobody writes: all crops stay random. Guides proper override what they need.

    Every rank calls every method, so that a guide may share work. What it writes is seen after
    `regions.sync()`.
    """

    passes: int = 0
    """Passes over the training images that the guide has made beside training."""

    def begin(self, regions: RegionTable) -> None:
        """Called once, before the first epoch of a run; not after a resume, whose table is restored."""

    def weights(self, batch: Batch) -> Tensor:
        """Weights (B,) of the losses, before the forward pass. By default those of the region table."""
        return batch.weights

    def kin(self, batch: Batch) -> Tensor | None:
        """Number and partner (B, 2) of every sample, if partners are to be no negatives; see `Method`."""
        return None

    def after_step(self, batch: Batch) -> None:
        """Called after every optimiser step. May not wait for the device."""

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        """Called after epoch number `epoch` (from 1) of `epochs`; says whether it wrote the table."""
        return False

    def sync(self) -> None:
        """Called on all ranks before the main one saves: make equal what `state_dict` holds."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the region table."""
        return {"passes": self.passes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict()`."""
        self.passes = int(state["passes"])


def build_guide(config: cfg.Config, method: Method, index: SampleIndex, device: torch.device) -> Guide:
    """The guide of a configuration.

    Raises:
        ValueError: the guide wants something that the data or the network do not have.
    """
    from .semantic_pairs import SemanticPairs

    boxes = _box_guide(config, config.box_guide, method, index, device)
    if isinstance(config.guide, cfg.SemanticPairs):
        return SemanticPairs(config, config.guide, boxes, index, device)
    return boxes


def _box_guide(
    config: cfg.Config, guide: cfg.BoxGuide, method: Method, index: SampleIndex, device: torch.device
) -> Guide:
    from .contrastive_crop import ContrastiveCrop
    from .fixed_boxes import SimCCrop, TrueBoxes
    from .online_crop import OnlineCrop
    from .saliency import Saliency

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
