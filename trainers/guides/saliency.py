"""Saliency for scene images (arXiv 2302.11461): pairs from salient regions, losses weighted by saliency.

We know only the abstract of the paper. It names the two uses of the map; everything else here is our design:
the map, how regions are read off it, how crops are scored and how scores become weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dali_views import Batch, RegionTable
from dali_views.maps.loss_weights import crop_saliency, pair_weights
from dali_views.system.stored import Form, entries, whole

from .. import config as cfg
from ..data import training_views
from ..engine import ranks
from .guide import Guide, Training, boxes_due
from .kept_maps import KeptMaps
from .reading import localise, looking_network

__all__ = ["Saliency"]

PAIRED = 2  # views whose crops are scored: the two global ones


class Saliency(Guide):
    """A pass at intervals makes a map per image; from it come up to K regions, and the weights of losses.

    All guided views of a sample are cut from one of its regions, drawn in proportion to its mean saliency.
    The weight of its loss is exp(s1 s2 / temperature), divided by the batch mean of that; s is the mean of
    the map inside the crop of a view.
    """

    config: cfg.Saliency

    def __init__(self, config: cfg.Saliency, training: Training) -> None:
        super().__init__(config, training)
        self.views = training_views(training.views)
        self.network = looking_network(training, config)
        self.maps = KeptMaps(len(training.index), config.map_size, config.rate, training.setting.device)

    def weights(self, batch: Batch) -> Tensor:
        if not self.passes:
            return torch.ones(len(batch), device=self.maps.maps.device)
        temperature = math.inf if self.config.temperature is None else self.config.temperature
        scores = []
        for number in range(PAIRED):
            rows = batch.partner if self.views[number].partner else batch.index
            maps = self.maps.normalised(rows)
            scores.append(crop_saliency(maps, batch.crops[:, number], batch.flipped[:, number]))
        return pair_weights(torch.stack(scores, dim=1), temperature, ranks.all_mean)

    def begin(self, regions: RegionTable) -> None:
        if self.config.warmup == 0:
            self._localise(regions)

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        if due := boxes_due(epoch, epochs, self.config):
            self._localise(regions)
        return due

    def _localise(self, regions: RegionTable) -> None:
        localise(self.training, self.network, self.config, regions, self.maps)
        self.passes += 1

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "maps": self.maps.state_dict()}

    def form(self) -> Form:
        return entries({"passes": whole(0), "maps": self.maps.form()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.maps.load_state_dict(state["maps"])
