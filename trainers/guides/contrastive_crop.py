"""ContrastiveCrop (arXiv 2202.03278): boxes from the encoder's own activation maps, now and then."""

from __future__ import annotations

import numpy as np
import torch

from dali_views import RegionTable, SampleIndex

from .. import config as cfg
from ..backbones import Backbone
from ..localise import locate
from . import Guide
from .schedule import is_due, warn_if_wide

__all__ = ["ContrastiveCrop", "SimCCrop"]


class ContrastiveCrop(Guide):
    """The published localisation pass and schedule (section 3.2 and the public code).

    All training images are localised after the epochs that `is_due` names. Until its first box is written
    a sample is cropped at random, which is the published warm-up.
    """

    def __init__(
        self, config: cfg.Config, guide: cfg.ContrastiveCrop, encoder: Backbone, index: SampleIndex,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.config = config
        self.guide = guide
        self.encoder = encoder
        self.index = index
        self.device = device

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        if not is_due(epoch, epochs, self.guide.warmup, self.guide.interval):
            return False
        self.passes += 1
        for found in locate(self.config, self.encoder, self.index, self.device):
            regions.update(found.rows, found.boxes)
        regions.sync()
        warn_if_wide(regions)
        return True


class SimCCrop(Guide):
    """One fixed centre box for every image, from the first epoch on, without a pass."""

    def __init__(self, guide: cfg.SimCCrop) -> None:
        self.guide = guide

    def begin(self, regions: RegionTable) -> None:
        box = np.array(self.guide.box, np.float32)
        regions.update(np.arange(len(regions)), np.tile(box, (len(regions), 1)))
        regions.sync()
