"""Boxes that no model finds: SimCCrop's centre box (arXiv 2202.03278), and true boxes as a control."""

from __future__ import annotations

import numpy as np

from dali_views import RegionTable

from .. import config as cfg
from ..engine import ranks
from .guide import Guide, Training

__all__ = ["SimCCrop", "TrueBoxes"]


class SimCCrop(Guide):
    """One fixed centre box for every image, from the first epoch on, without a pass."""

    config: cfg.SimCCrop

    def begin(self, regions: RegionTable) -> None:
        rows = np.arange(ranks.rank(), len(regions), ranks.world())
        regions.update(rows, np.tile(np.array(self.config.box, np.float32), (len(rows), 1)))
        regions.sync()


class TrueBoxes(Guide):
    """The largest true box of every image that has one: an upper bound of what better boxes can bring.

    A control for guides that find boxes themselves; images without true boxes keep random crops.
    """

    def __init__(self, config: cfg.TrueBoxes, training: Training) -> None:
        if not len(training.index.boxes):
            raise ValueError(
                "guide.name true_boxes needs true boxes; name them by data.boxes or data.instances"
            )
        super().__init__(config, training)

    def begin(self, regions: RegionTable) -> None:
        rows, boxes = self.training.index.largest_boxes()
        mine = rows % ranks.world() == ranks.rank()
        regions.update(rows[mine], boxes[mine])
        regions.sync()
