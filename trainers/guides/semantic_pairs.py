"""Semantic positive pairs (arXiv 2306.16122): another image of the same content as the second view."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dali_views import Batch, RegionTable, SampleIndex
from dali_views.system.files import atomic_write

from .. import config as cfg
from ..encoders.frozen import embed, frozen_encoder
from ..engine import ranks as distributed
from .guide import Guide
from .partner_checks import label_partners, precision, random_partners
from .partners import find_partners

__all__ = ["PARTNERS", "SemanticPairs"]

PARTNERS = "partners.json"
"""In the run folder: how many pairs are of one class, by similarity; null where nothing is known of it."""


class SemanticPairs(Guide):
    """Finds a partner for each anchor once, before training, and pairs a share of them anew every epoch.

    The paper's abstract tells of a pre-trained encoder and a similarity; which anchors, the band and how
    pairs mix with ordinary views are our choice. An image without a partner, or not drawn in an epoch, is
    its own partner, which is the ordinary pair.

    Args:
        boxes: the guide that writes boxes and weights beside the partners; asked for everything else.
    """

    def __init__(
        self, config: cfg.Config, guide: cfg.SemanticPairs, boxes: Guide, index: SampleIndex,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.config = config
        self.guide = guide
        self.boxes = boxes
        self.index = index
        self.device = device
        self.partner = torch.arange(len(index))

    def begin(self, regions: RegionTable) -> None:
        self.boxes.begin(regions)
        seed, labels = self.config.run.seed, torch.from_numpy(self.index.labels.astype(np.int64))
        drawn = np.random.default_rng([seed, 1]).permutation(len(self.index))
        anchors = torch.from_numpy(np.sort(drawn[: max(1, round(self.guide.anchors * len(drawn)))]))
        cosine = None
        if self.guide.encoder is not None:
            encoder, like = frozen_encoder(self.config, self.guide.encoder, self.device)
            found = find_partners(
                embed(like, encoder, self.index, self.device), band=self.guide.band,
                kind=self.guide.band_kind, anchors=anchors,
            )  # fmt: skip
            self.partner, cosine = found.partner.cpu(), found.cosine.cpu()
            self.passes += 1
            # A control pairs as many, and the same ones, so that nothing but the choice of partner differs.
            anchors = torch.nonzero(self.partner != torch.arange(len(self.index))).flatten()
        match self.guide.control:
            case "random":
                self.partner, cosine = random_partners(len(self.index), seed, anchors), None
            case "label":
                self.partner, cosine = label_partners(labels, seed, anchors), None
        if torch.equal(self.partner, torch.arange(len(self.index))):
            raise ValueError(self._without_pairs())
        if distributed.is_main():
            right = precision(self.partner, labels, cosine)
            tqdm.write(self._told(right))
            with atomic_write(Path(self.config.run.out) / PARTNERS) as file:
                file.write(json.dumps(right, indent=1).replace("NaN", "null").encode())
        self._pair(regions, 0)

    def weights(self, batch: Batch) -> Tensor:
        return self.boxes.weights(batch)

    def kin(self, batch: Batch) -> Tensor | None:
        return torch.stack([batch.index, batch.partner], dim=1) if self.guide.mask else None

    def after_step(self, batch: Batch) -> None:
        self.boxes.after_step(batch)

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        wrote = self.boxes.after_epoch(regions, epoch, epochs)
        if self.guide.share < 1 and epoch < epochs:
            self._pair(regions, epoch)
        return wrote

    def sync(self) -> None:
        self.boxes.sync()

    def _pair(self, regions: RegionTable, epoch: int) -> None:
        """Write the partners of a share of the images, drawn by seed and epoch, into the table."""
        rows = np.arange(len(self.index))
        draw = np.random.default_rng([self.config.run.seed, 2, epoch])
        paired = draw.random(len(rows)) < self.guide.share
        partner = np.where(paired, self.partner.numpy(), rows)
        mine = slice(distributed.rank(), None, distributed.world())
        regions.update(rows[mine], partner=partner[mine])
        # Before anyone writes boxes: of a row that several ranks have written, one alone is kept.
        regions.sync()

    def _without_pairs(self) -> str:
        if self.guide.control == "label":
            return (
                "no two images have one label, so that there are no pairs; guide.control=label needs labels"
            )
        low, high = self.guide.band
        return (
            f"no image has a partner of similarity {low} to {high} by {self.guide.encoder}; widen guide.band "
            "or set guide.band_kind=quantile, which takes shares of random pairs instead of cosines"
        )

    def _told(self, found: Mapping[str, Any]) -> str:
        told = f"{found['pairs']} semantic pairs"
        if found["pairs"] and np.isfinite(found["precision"]):
            told += f", {found['precision']:.1%} of them of one class (by chance {found['chance']:.1%})"
        return told

    def state_dict(self) -> dict[str, Any]:
        passes = self.passes + self.boxes.passes
        return {"passes": passes, "partner": self.partner, "boxes": self.boxes.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.partner = state["partner"].clone()
        self.boxes.load_state_dict(state["boxes"])
        self.passes = int(state["passes"]) - self.boxes.passes
