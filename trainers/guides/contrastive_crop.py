"""ContrastiveCrop (arXiv 2202.03278): boxes from the encoder's own activation maps, now and then."""

from __future__ import annotations

import torch

from dali_views import RegionTable, SampleIndex
from dali_views.maps.boxes import boxes_from_maps

from .. import config as cfg
from ..methods import Method
from .guide import Guide
from .localise import input_size, locate
from .schedule import boxes_due, warn_if_wide

__all__ = ["ContrastiveCrop"]


class ContrastiveCrop(Guide):
    """The published localisation pass and schedule (section 3.2 and the public code).

    All training images are localised after the epochs that `boxes_due` names. Until its first box is written
    a sample is cropped at random, which is the published warm-up.
    """

    def __init__(
        self, config: cfg.Config, guide: cfg.ContrastiveCrop, method: Method, index: SampleIndex,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.config = config
        self.guide = guide
        self.method = method
        self.index = index
        self.device = device

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        if not boxes_due(epoch, epochs, self.guide.warmup, self.guide.interval):
            return False
        self.passes += 1
        guide, size = self.guide, input_size(self.config, self.guide)
        for found in locate(self.config, self.method, self.index, self.device, guide, guide.map):
            regions.update(found.rows, boxes_from_maps(found.maps, guide.threshold, (size, size)))
        regions.sync()
        warn_if_wide(regions)
        return True
