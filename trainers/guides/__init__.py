"""Guides: who writes the region table, and when; one file each."""

from __future__ import annotations

import torch

from dali_views import RegionTable, SampleIndex

from .. import config as cfg
from ..backbones import Backbone

__all__ = ["Guide", "build_guide"]


class Guide:
    """Nobody writes: all crops stay random. Guides proper override what they need.

    Every rank calls every method, so that a guide may share work and synchronise.
    """

    def begin(self, regions: RegionTable) -> None:
        """Called once, before the first epoch of a run; not after a resume, whose table is restored."""

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        """Called after epoch number `epoch` (from 1) of `epochs`; says whether it wrote the table."""
        return False


def build_guide(config: cfg.Config, encoder: Backbone, index: SampleIndex, device: torch.device) -> Guide:
    """The guide of a configuration."""
    from .contrastive_crop import ContrastiveCrop, SimCCrop

    match config.guide:
        case cfg.NoGuide():
            return Guide()
        case cfg.ContrastiveCrop():
            return ContrastiveCrop(config, config.guide, encoder, index, device)
        case cfg.SimCCrop():
            return SimCCrop(config.guide)
