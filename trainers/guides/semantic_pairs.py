"""Semantic positive pairs (arXiv 2306.16122): another image of the same content as the second view."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dali_views import Batch, RegionTable
from dali_views.system.files import atomic_write
from dali_views.system.stored import Form, entries, numbers, whole

from .. import config as cfg
from ..encoders.frozen import embed, frozen_encoder
from ..engine import ranks
from .guide import Guide, Training
from .partners import find_partners, label_partners, precision, random_partners

__all__ = ["PARTNERS", "SemanticPairs"]

PARTNERS = "partners.json"
"""In the run folder: how many pairs are of one class, by similarity; null where labels are unknown."""


class SemanticPairs(Guide):
    """Finds a partner for each anchor once, before training, and pairs a share of them anew every epoch.

    The paper's abstract names a pre-trained encoder and a similarity; the choice of anchors, the band and how
    pairs mix with ordinary views are ours. An image without a partner, or not drawn in an epoch, is its own
    partner: it has the ordinary pair alone. The guide `boxes` writes boxes and weights beside the partners.
    """

    config: cfg.SemanticPairs

    def __init__(self, config: cfg.SemanticPairs, training: Training, boxes: Guide) -> None:
        super().__init__(config, training)
        self.boxes = boxes
        self.partner = torch.arange(len(training.index))

    def begin(self, regions: RegionTable) -> None:
        self.boxes.begin(regions)
        how, index, setting = self.config, self.training.index, self.training.setting
        labels, itself = torch.from_numpy(index.labels.astype(np.int64)), torch.arange(len(index))
        drawn = np.random.default_rng([setting.seed, 1]).permutation(len(index))
        anchors = torch.from_numpy(np.sort(drawn[: max(1, round(how.anchors * len(drawn)))]))
        cosine = None
        if how.encoder is not None:
            encoder, views = frozen_encoder(self.training.views, how.encoder, setting.device)
            features = embed(setting, views, encoder, index)
            found = find_partners(features, band=how.band, kind=how.band_kind, anchors=anchors)
            self.partner, cosine = found.partner.cpu(), found.cosine.cpu()
            self.passes += 1
            # A control pairs the same images, so that it differs only in the choice of partners.
            anchors = torch.nonzero(self.partner != itself).flatten()
        match how.control:
            case "random":
                self.partner, cosine = random_partners(len(index), setting.seed, anchors), None
            case "label":
                self.partner, cosine = label_partners(labels, setting.seed, anchors), None
        if torch.equal(self.partner, itself):
            raise ValueError(self._without_pairs())
        if ranks.is_main():
            right = precision(self.partner, labels, cosine)
            tqdm.write(_told(right))
            with atomic_write(self.training.out / PARTNERS) as file:
                file.write(json.dumps(right, indent=1).replace("NaN", "null").encode())
        self._pair(regions, 0)

    def weights(self, batch: Batch) -> Tensor:
        return self.boxes.weights(batch)

    def losses(self, network: Callable[..., Tensor], batch: Batch) -> Tensor:
        if self.training.views.partner == "replace":
            return super().losses(network, batch)
        # The ordinary pairs and the semantic ones are one set of pairs, of which the loss is the mean but for
        # a factor. The guide `boxes` looks at the views of the first call.
        *views, other = batch.views
        own = network(views, self.kin(batch))
        added = network([views[0], other, *views[2:]], self.kin(batch))
        return own + added.where(batch.partner != batch.index, 0)

    def kin(self, batch: Batch) -> Tensor | None:
        return torch.stack([batch.index, batch.partner], dim=1) if self.config.mask else None

    def after_batch(self, batch: Batch) -> None:
        self.boxes.after_batch(batch)

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        wrote = self.boxes.after_epoch(regions, epoch, epochs)
        if self.config.share < 1 and epoch < epochs:
            self._pair(regions, epoch)
        return wrote

    def sync(self) -> None:
        self.boxes.sync()

    def _pair(self, regions: RegionTable, epoch: int) -> None:
        """Write the partners of a share of the images, drawn by seed and epoch, into the table."""
        rows = np.arange(len(self.partner))
        draw = np.random.default_rng([self.training.setting.seed, 2, epoch])
        paired = draw.random(len(rows)) < self.config.share
        partner = np.where(paired, self.partner.numpy(), rows)
        mine = slice(ranks.rank(), None, ranks.world())
        regions.update(rows[mine], partner=partner[mine])
        # Before boxes are written: if several ranks have written a row, only one is kept.
        regions.sync()

    def _without_pairs(self) -> str:
        if self.config.control == "label":
            return "no two images have one label, so there are no pairs; guide.control=label needs labels"
        low, high = self.config.band
        return (
            f"no image has a partner of similarity {low} to {high} by {self.config.encoder}; widen "
            "guide.band or set guide.band_kind=quantile, which takes shares of random pairs, not cosines"
        )

    def state_dict(self) -> dict[str, Any]:
        passes = self.passes + self.boxes.passes
        return {"passes": passes, "partner": self.partner, "boxes": self.boxes.state_dict()}

    def form(self) -> Form:
        rows = len(self.partner)
        partner = numbers((rows,), "int64", low=0, high=rows - 1)
        return entries({"passes": whole(0), "partner": partner, "boxes": self.boxes.form()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.partner = state["partner"].clone()
        self.boxes.load_state_dict(state["boxes"])
        self.passes = int(state["passes"]) - self.boxes.passes


def _told(found: Mapping[str, Any]) -> str:
    told = f"{found['pairs']} semantic pairs"
    if found["pairs"] and np.isfinite(found["precision"]):
        told += f", {found['precision']:.1%} of them of one class (by chance {found['chance']:.1%})"
    return told
