"""ContrastiveCrop (arXiv 2202.03278): boxes from the encoder's own activation maps, now and then."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from dali_views import RegionTable, SampleIndex

from .. import config as cfg
from ..backbones import Backbone
from ..localise import locate
from . import Guide

__all__ = ["ContrastiveCrop", "SimCCrop"]

WIDE = 0.9  # median share of the image above which boxes say nothing


class ContrastiveCrop(Guide):
    """The published localisation pass and schedule (section 3.2 and the public code).

    After epoch e, counted from 1, all training images are localised iff e >= warm-up, e is a multiple of
    the interval and e is not the last. Until its first box is written a sample is cropped at random,
    which is the published warm-up.
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

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether boxes are rewritten after `epoch`, counted from 1."""
        return epoch >= self.guide.warmup and epoch % self.guide.interval == 0 and epoch != epochs

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        if not self.due(epoch, epochs):
            return False
        for found in locate(self.config, self.encoder, self.index, self.device):
            regions.update(found.rows, found.boxes)
        regions.sync()
        areas = np.prod(regions.boxes[:, 0, 2:] - regions.boxes[:, 0, :2], axis=1)
        if np.median(areas) > WIDE:
            warnings.warn(
                f"half of the boxes cover more than {WIDE:.0%} of their image, so they hardly guide; "
                "raise guide.threshold or look at the heatmaps",
                stacklevel=2,
            )
        return True


class SimCCrop(Guide):
    """One fixed centre box for every image, from the first epoch on, without a pass."""

    def __init__(self, guide: cfg.SimCCrop) -> None:
        self.guide = guide

    def begin(self, regions: RegionTable) -> None:
        box = np.array(self.guide.box, np.float32)
        regions.update(np.arange(len(regions)), np.tile(box, (len(regions), 1)))
        regions.sync()
