"""Saliency for scene images (arXiv 2302.11461): pairs from salient regions, losses weighted by saliency.

Of the paper only the abstract is known to us. It names the two uses of the map; everything else here is our
design: the map, how regions are read off it, how crops are scored and how scores become weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dali_views import Batch, RegionTable, SampleIndex
from dali_views.maps.boxes import regions_from_maps
from dali_views.maps.weights import crop_saliency, pair_weights

from .. import config as cfg
from ..data import training_views
from ..engine import ranks as distributed
from ..methods import Method
from .guide import Guide
from .image_maps import ImageMaps
from .localise import input_size, locate
from .schedule import boxes_due, warn_if_wide

__all__ = ["Saliency"]

PAIRED = 2  # views whose crops are scored: the two global ones


class Saliency(Guide):
    """A pass at intervals makes a map per image; from it come up to K regions, and the weights of losses.

    A sample's guided views are all cut from one of its regions, drawn in proportion to its mean saliency.
    The weight of its loss is exp(s1 s2 / temperature) over the batch mean of that, s the mean of the map in
    the crop of a view.
    """

    def __init__(
        self, config: cfg.Config, guide: cfg.Saliency, method: Method, index: SampleIndex,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.config = config
        self.guide = guide
        self.method = method
        self.index = index
        self.device = device
        self.views = training_views(config.views)
        self.maps = ImageMaps(len(index), guide.map_size, 1.0, device)

    def weights(self, batch: Batch) -> Tensor:
        if not self.passes:
            return torch.ones(len(batch), device=self.device)
        temperature = math.inf if self.guide.temperature is None else self.guide.temperature
        scores = []
        for number in range(PAIRED):
            rows = batch.partner if self.views[number].source == "partner" else batch.index
            maps = self.maps.normalised(rows)
            scores.append(crop_saliency(maps, batch.crops[:, number], batch.flipped[:, number]))
        return pair_weights(torch.stack(scores, dim=1), temperature, distributed.all_mean)

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        guide = self.guide
        if not boxes_due(epoch, epochs, guide.warmup, guide.interval):
            return False
        size = input_size(self.config, guide)
        for part in locate(self.config, self.method, self.index, self.device, guide, guide.map):
            boxes, weights = regions_from_maps(
                part.maps, guide.regions, guide.threshold, guide.min_area, size=(size, size)
            )
            regions.update(part.rows, boxes, weights)
            self.maps.put(part.rows, part.maps)
        regions.sync()
        self.maps.sync()
        self.passes += 1
        warn_if_wide(regions)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "maps": self.maps.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.maps.load_state_dict(state["maps"])
