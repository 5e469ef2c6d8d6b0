"""Boxes that no model finds: SimCCrop's centre box (arXiv 2202.03278), and true boxes as a control."""

from __future__ import annotations

import numpy as np

from dali_views import RegionTable, SampleIndex

from .. import config as cfg
from ..engine import ranks as distributed
from .guide import Guide

__all__ = ["SimCCrop", "TrueBoxes"]


class SimCCrop(Guide):
    """One fixed centre box for every image, from the first epoch on, without a pass."""

    def __init__(self, guide: cfg.SimCCrop) -> None:
        self.guide = guide

    def begin(self, regions: RegionTable) -> None:
        box = np.array(self.guide.box, np.float32)
        rows = np.arange(distributed.rank(), len(regions), distributed.world())
        regions.update(rows, np.tile(box, (len(rows), 1)))
        regions.sync()


class TrueBoxes(Guide):
    """The largest true box of every image that has one: what better boxes could bring at most.

    A control to be read beside guides that look for themselves; images without true boxes stay at random
    crops.

    Raises:
        ValueError: the training images have no true boxes.
    """

    def __init__(self, index: SampleIndex) -> None:
        if not len(index.boxes):
            raise ValueError(
                "guide.name true_boxes needs true boxes; name them by data.boxes or data.instances"
            )
        self.index = index

    def begin(self, regions: RegionTable) -> None:
        rows, boxes = [], []
        for row in range(distributed.rank(), len(self.index), distributed.world()):
            true = self.index.truth(row)
            if len(true):
                rows.append(row)
                boxes.append(true[np.prod(true[:, 2:] - true[:, :2], axis=1).argmax()])
        regions.update(np.array(rows, np.int64), np.array(boxes, np.float32).reshape(-1, 4))
        regions.sync()
