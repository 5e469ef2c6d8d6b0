"""ContrastiveCrop's boxes without its pass: from the maps of the views that training sees anyway (ours)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dali_views import Batch, RegionTable
from dali_views.maps.align import Offset
from dali_views.system import stored

from .. import config as cfg
from ..data import training_views
from ..engine import ranks
from .encoder_maps import EncoderMaps, Located, offset_of
from .guide import Guide, Training, boxes_due
from .kept_maps import KeptMaps, ViewMaps
from .reading import warn_if_useless, write

__all__ = ["OnlineCrop"]

_CHUNK = 4096  # maps upsampled at a time


class OnlineCrop(Guide):
    """Puts the maps of all views back where they were cut and reads boxes off the averages.

    Boxes, threshold and schedule are ContrastiveCrop's (arXiv 2202.03278), but the network sees augmented
    views in training mode, and after the first pass never an image for the sake of boxes.
    """

    config: cfg.OnlineCrop

    def __init__(self, config: cfg.OnlineCrop, training: Training) -> None:
        super().__init__(config, training)
        # Not those of a partner, which may occur several times in a batch and has views of its own.
        shown = training_views(training.views)
        self.own = [not view.partner for view in shown]
        net = training.method.backbone
        layer = config.layer or net.feature_layer
        length, device = len(training.index), training.setting.device
        self.sides = {view.size for view in shown} if config.aligned else set()
        self.views = ViewMaps(net, layer, net.prefix_tokens, net.channels_last_maps)
        self.maps = KeptMaps(length, config.map_size, config.rate, device)

    def after_batch(self, batch: Batch) -> None:
        seen = self.views.take(len(batch))
        if self.training.views.partner == "add":
            seen = seen[: len(seen) // 2]  # the second call sees partners, and the first view again
        for number, view in enumerate(seen):
            if self.own[number]:
                placed = (each[:, number] for each in (batch.crops, batch.flipped, batch.rotated))
                self.maps.add(batch.index, view, *placed)

    def begin(self, regions: RegionTable) -> None:
        self._measure()
        if self.config.warmup == 0:
            encoder_maps = EncoderMaps(self.training.setting, self.training.views, self.config)
            for part in encoder_maps.located(self.training.method, self.training.index, "activation"):
                deviation, mean = torch.std_mean(part.maps)  # as maps of views are
                self.maps.put(part.rows, (part.maps - mean) / deviation.clamp(min=1e-6))
            self.maps.sync()
            self._read(regions)
            self.passes += 1

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        self.maps.sync()
        self._measure()
        if due := boxes_due(epoch, epochs, self.config):
            self._read(regions)
        return due

    def _measure(self) -> None:
        """How far maps of views lie beside them, with the weights as they are now, for the next epoch."""
        net, device = self.training.method.backbone, self.training.setting.device
        for side in self.sides:
            shape = torch.empty(1, 3, side, side, device=device)
            self.views.offsets[side] = offset_of(net, self.config.layer or net.feature_layer, shape)

    def _read(self, regions: RegionTable) -> None:
        """Boxes from the kept maps, which are equal on all ranks; each reads the boxes of its share."""
        side = self.config.size or self.training.views.size
        first, step = ranks.rank() * _CHUNK, ranks.world() * _CHUNK

        def parts() -> Iterator[Located]:
            for start in range(first, len(regions), step):
                rows = torch.arange(start, min(start + _CHUNK, len(regions)), device=self.maps.maps.device)
                yield Located(rows, self.maps.normalised(rows))

        write(regions, parts(), self.config, (side, side))
        regions.sync()
        maps = self.maps.normalised(slice(_CHUNK))
        self.training.found["cell"] = 1 / maps[0].numel()
        warn_if_useless(self.training, regions, maps, self.config, (side, side))

    def sync(self) -> None:
        self.maps.sync()

    def state_dict(self) -> dict[str, Any]:
        kept = {"maps": self.maps.state_dict(), "offsets": dict(self.views.offsets)}
        return {**super().state_dict(), **kept}

    def form(self) -> stored.Form:
        offset = stored.sequence([stored.number(), stored.number()])
        offsets = stored.each(stored.whole(1), stored.maybe(offset))
        return stored.entries({"passes": stored.whole(0), "maps": self.maps.form(), "offsets": offsets})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.maps.load_state_dict(state["maps"])
        self.views.offsets = {side: offset and Offset(*offset) for side, offset in state["offsets"].items()}
