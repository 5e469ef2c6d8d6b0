"""ContrastiveCrop's boxes without its pass: from the maps of the very views that training looks at (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dali_views import Batch, RegionTable, SampleIndex
from dali_views.maps.boxes import boxes_from_maps

from .. import config as cfg
from ..data import training_views
from ..engine import ranks as distributed
from ..methods import Method
from .guide import Guide
from .image_maps import ImageMaps, ViewMaps
from .localise import input_size
from .schedule import boxes_due, warn_if_wide

__all__ = ["OnlineCrop"]

_CHUNK = 4096  # maps upsampled at a time


class OnlineCrop(Guide):
    """Puts the maps of all views back where they were cut and reads boxes off the averages.

    The boxes, their threshold and their schedule are ContrastiveCrop's (arXiv 2202.03278), but the network
    looks at augmented views in training mode, and never at an image for the boxes' sake.
    """

    def __init__(
        self, config: cfg.Config, guide: cfg.OnlineCrop, method: Method, index: SampleIndex,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.guide = guide
        self.size = input_size(config, guide)
        # A partner may be shown several times in a batch, and has views of its own elsewhere.
        self.own = [view.source == "self" for view in training_views(config.views)]
        backbone = method.backbone
        self.views = ViewMaps(
            backbone,
            guide.layer or backbone.feature_layer,
            backbone.prefix_tokens,
            backbone.channels_last_maps,
        )
        self.maps = ImageMaps(len(index), guide.map_size, guide.rate, device)

    def after_step(self, batch: Batch) -> None:
        for number, view in enumerate(self.views.take(len(batch))):
            if self.own[number]:
                self.maps.add(batch.index, view, batch.crops[:, number], batch.flipped[:, number])

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        self.maps.sync()
        if not boxes_due(epoch, epochs, self.guide.warmup, self.guide.interval):
            return False
        # The maps are equal on all ranks; each reads the boxes of its share.
        first, step = distributed.rank() * _CHUNK, distributed.world() * _CHUNK
        for start in range(first, len(regions), step):
            rows = torch.arange(start, min(start + _CHUNK, len(regions)), device=self.maps.maps.device)
            maps = self.maps.normalised(rows)
            regions.update(rows, boxes_from_maps(maps, self.guide.threshold, (self.size, self.size)))
        regions.sync()
        warn_if_wide(regions)
        return True

    def sync(self) -> None:
        self.maps.sync()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "maps": self.maps.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.maps.load_state_dict(state["maps"])
