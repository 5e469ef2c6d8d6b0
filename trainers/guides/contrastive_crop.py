"""ContrastiveCrop (arXiv 2202.03278): boxes from the encoder's own maps; `dali_views.plan` draws crops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dali_views import RegionTable
from dali_views.system.stored import Form, entries, whole

from .. import config as cfg
from .guide import Guide, Training, boxes_due
from .kept_maps import KeptMaps
from .reading import localise, looking_network

__all__ = ["ContrastiveCrop"]


class ContrastiveCrop(Guide):
    """The published localisation pass and schedule (section 3.2 and the public code).

    After the epochs that `boxes_due` names, all training images are localised. Until the first box is written
    crops are random, which is the published warm-up.
    """

    config: cfg.ContrastiveCrop

    def __init__(self, config: cfg.ContrastiveCrop, training: Training) -> None:
        super().__init__(config, training)
        self.network = looking_network(training, config)
        self.maps = None
        if config.rate < 1:
            length, device = len(training.index), training.setting.device
            self.maps = KeptMaps(length, config.map_size, config.rate, device)

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
        kept = {} if self.maps is None else {"maps": self.maps.state_dict()}
        return {**super().state_dict(), **kept}

    def form(self) -> Form:
        kept = {} if self.maps is None else {"maps": self.maps.form()}
        return entries({"passes": whole(0), **kept})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self.maps is not None:
            self.maps.load_state_dict(state["maps"])
