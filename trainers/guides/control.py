"""Controls: a guide's boxes where they say nothing, so that a gain is shown to come from looking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from dali_views import Batch, RegionTable
from dali_views.system.stored import Form, entries, maybe, whole

from ..engine import ranks
from .guide import Guide

__all__ = ["Controlled"]


class Controlled(Guide):
    """Runs a guide on a table of its own, and writes its boxes elsewhere.

    "shuffled": image i gets boxes and weights of another image, the same one for the whole run. Overlap and
    places of crops are as guided ones; only the object is missing.
    "matched": boxes keep height and width and go to random places of their own image, anew every epoch.

    `weights` stay those of the guide: the saliency of a crop is that of the image it was cut from.
    """

    def __init__(self, guide: Guide) -> None:
        super().__init__(guide.config, guide.training)
        self.guide = guide
        self.own: RegionTable | None = None  # made by the first `begin` or `load_state_dict`

    def begin(self, regions: RegionTable) -> None:
        self.own = RegionTable(len(regions), regions.regions)
        self.guide.begin(self.own)
        self._write(regions, 0)

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        assert self.own is not None
        self.own.epoch = regions.epoch
        wrote = self.guide.after_epoch(self.own, epoch, epochs)
        if wrote or self.config.control == "matched":
            self._write(regions, epoch)
        return wrote

    def _write(self, regions: RegionTable, epoch: int) -> None:
        """This rank's share of the rows that the guide has written; all ranks hold equal tables."""
        assert self.own is not None
        seed, own = self.training.setting.seed, self.own
        if self.config.control == "shuffled":
            # A cycle through all images in random order: none keeps its own boxes.
            order = np.random.default_rng([seed, 3]).permutation(len(own))
            source = np.empty_like(order)
            source[order] = np.roll(order, 1)
        else:
            source = np.arange(len(own))
        rows = np.flatnonzero(own.written[source])[ranks.rank() :: ranks.world()]
        boxes, weights = own.boxes[source[rows]], own.weights[source[rows]]
        if self.config.control == "matched":
            size = boxes[..., 2:] - boxes[..., :2]
            start = np.random.default_rng([seed, 4, epoch]).random((len(own), *size.shape[1:]))[rows]
            start = (start * (1 - size)).astype(np.float32)
            boxes = np.concatenate([start, (start + size).clip(max=1)], axis=-1)
        regions.update(rows, boxes, weights)
        regions.sync()

    @property
    def passes(self) -> int:  # type: ignore[override]
        """Those of the guide."""
        return self.guide.passes

    def weights(self, batch: Batch) -> Tensor:
        return self.guide.weights(batch)

    def after_batch(self, batch: Batch) -> None:
        self.guide.after_batch(batch)

    def sync(self) -> None:
        self.guide.sync()

    def state_dict(self) -> dict[str, Any]:
        own = None if self.own is None else self.own.state_dict()
        return {"passes": self.passes, "guide": self.guide.state_dict(), "own": own}

    def form(self) -> Form:
        own = RegionTable(len(self.training.index), getattr(self.config, "regions", 1))
        return entries({"passes": whole(0), "guide": self.guide.form(), "own": maybe(own.form())})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.guide.load_state_dict(state["guide"])
        if state["own"] is not None:
            length, regions, _ = state["own"]["boxes"].shape
            self.own = RegionTable(length, regions)
            self.own.load_state_dict(state["own"])
