"""Evaluations: what an encoder has learnt, measured through the decode and resize of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from dali_views import RegionTable, SampleIndex, ViewLoader
from dali_views.tools.sample import drawings, sheet

from .. import config as cfg
from ..data import DataSets, evaluation_views, loader_options, plain_loader, training_views
from ..encoders.backbones import Backbone
from ..engine import ranks as distributed
from ..engine.amp import autocast
from ..guides.localise import boxes_of, maps_of
from .knn import check_votes, extract, knn_accuracy
from .localisation import THRESHOLDS, Localised, best_overlap, best_threshold, spread_rows

__all__ = ["Evaluation", "Evaluator", "knn"]

PICTURED = 6


@dataclass(frozen=True)
class Evaluation:
    """One evaluation."""

    scores: dict[str, float]
    """knn_top1, knn_top5 (shares), iou, corloc, box_area, box_threshold; those that the data allow."""
    picture: Image.Image | None
    """Images with heatmap, box and views; on the main rank."""
    localised: Localised | None = None
    """The boxes that iou and corloc tell of."""


def knn(
    config: cfg.Config, encoder: Backbone, bank: SampleIndex, queries: SampleIndex, device: torch.device,
    k: Sequence[int] = (200,), temperature: float = 0.1,
) -> dict[int, dict[str, float]]:  # fmt: skip
    """Weighted kNN top-1 and top-5 of an encoder's pooled features, as shares, for each of some k.

    Raises:
        ValueError: as by `check_votes` and `knn_accuracy`.
    """
    check_votes(k, temperature)

    def features(images: Tensor) -> Tensor:
        with autocast(config, device):
            return encoder(images)

    training = encoder.training
    encoder.eval()
    voters, asked = (
        extract(features, plain_loader(config, index, evaluation_views(config.views)), device)
        for index in (bank, queries)
    )
    encoder.train(training)
    return {each: knn_accuracy(*voters[:2], *asked[:2], each, temperature) for each in k}


class Evaluator:
    """Measures the encoder during training. Every rank takes part.

    kNN is measured if the data have labels, localisation (mean IoU of the encoder's box with the
    best-matching true box, and CorLoc, by `best_threshold`) if they have boxes. The boxes are read as
    `config.localise` says, whatever guides the crops.
    """

    def __init__(
        self,
        config: cfg.Config,
        data: DataSets,
        encoder: Backbone,
        regions: RegionTable,
        device: torch.device,
    ) -> None:
        self.config = config
        self.data = data
        self.encoder = encoder
        self.regions = regions
        self.device = device
        boxed = data.queries if data.queries is not None and len(data.queries.boxes) else data.train
        self.boxed = boxed.subset(spread_rows(len(boxed))) if len(boxed.boxes) else None
        self.rows = spread_rows(len(data.train), PICTURED)

    def run(self) -> Evaluation:
        """Evaluate the encoder as it is now."""
        scores: dict[str, float] = {}
        localised = None
        if self.data.queries is not None:
            (accuracy,) = knn(
                self.config, self.encoder, self.data.bank, self.data.queries, self.device
            ).values()
            scores |= {"knn_top1": accuracy["top1"], "knn_top5": accuracy["top5"]}
        if self.boxed is not None:
            maps = self.config.localise
            boxes = boxes_of(self.config, self.encoder, self.boxed, self.device, maps, maps.map, THRESHOLDS)
            found = best_threshold(boxes, self.boxed)
            scores |= {"iou": found["iou_best"], "corloc": found["corloc"]}
            scores |= {"box_area": found["area"], "box_threshold": found["threshold"]}
            chosen = boxes[THRESHOLDS.index(found["threshold"])]
            overlap = best_overlap(chosen, self.boxed)
            localised = Localised(self.boxed, chosen, overlap, found["threshold"])
        return Evaluation(scores, self._picture() if distributed.is_main() else None, localised)

    def _picture(self) -> Image.Image:
        """A few training images: heatmap as of now, box as in the table, views as training would cut them."""
        index = self.data.train.subset(self.rows)
        regions = self.regions.subset(self.rows)
        views = training_views(self.config.views)
        options = {**loader_options(self.config), "dtype": "float32", "max_bad_share": 1.0}
        loader = ViewLoader(
            index, views, len(index), regions=regions, shuffle=False, rank=0, world=1, **options
        )
        batch = next(iter(loader))
        how = self.config.localise
        maps = maps_of(self.config, self.encoder, index, self.device, how, how.map)[batch.index.cpu()]
        views_config = self.config.views
        drawn = drawings(
            index, batch, views, regions, heatmaps=maps.numpy(), mean=views_config.mean, std=views_config.std
        )
        return sheet([(f"{each.name}  {each.facts}", [*each.images, *each.views]) for each in drawn])
