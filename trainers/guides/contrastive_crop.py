"""ContrastiveCrop (arXiv 2202.03278): boxes from the encoder's own maps; `dali_views.plan` draws crops."""

from __future__ import annotations

from dali_views import RegionTable
from dali_views.maps.boxes import boxes_from_maps

from .. import config as cfg
from .encoder_maps import EncoderMaps
from .guide import Guide, boxes_due, warn_if_wide

__all__ = ["ContrastiveCrop"]


class ContrastiveCrop(Guide):
    """The published localisation pass and schedule (section 3.2 and the public code).

    After the epochs that `boxes_due` names, all training images are localised. Until the first box is written
    crops are random, which is the published warm-up.
    """

    config: cfg.ContrastiveCrop

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        how, training = self.config, self.training
        if not boxes_due(epoch, epochs, how):
            return False
        encoder_maps = EncoderMaps(training.setting, training.views, how)
        for part in encoder_maps.located(training.method, training.index, how.map):
            regions.update(part.rows, boxes_from_maps(part.maps, how.threshold, encoder_maps.shape))
        regions.sync()
        self.passes += 1
        warn_if_wide(regions)
        return True
