"""What is measured during training (`Evaluator`), and how well each kind of map finds objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dali_views import RegionTable, SampleIndex, ViewLoader
from dali_views.maps.boxes import Threshold, boxes_from_maps
from dali_views.maps.coordinates import iou
from dali_views.tools.sample import drawings, sheet

from .. import config as cfg
from ..data import DataSets, loader_options, training_views
from ..encoders.backbones import Backbone
from ..engine import ranks
from ..engine.setting import Setting
from ..guides.encoder_maps import EncoderMaps
from ..guides.kept_maps import KeptMaps
from ..methods import Method
from . import box_scores
from .box_scores import THRESHOLDS, Localised, best_threshold, localisation, spread_rows
from .knn import knn_accuracy, plain_share
from .online_probe import OnlineProbe

__all__ = ["Evaluation", "Evaluator", "map_scores", "seen_maps", "table"]

PICTURED = 6


@dataclass(frozen=True)
class Evaluation:
    """One evaluation."""

    scores: dict[str, float]
    """knn_top1, knn_top5, online_test_top1 (shares), iou, corloc, box_area, box_threshold; those that the
    data allow."""
    picture: Image.Image | None  # images with heatmap, box and views; on the main rank
    localised: Localised | None = None  # the boxes that iou and corloc are computed from


class Evaluator:
    """Measures the encoder during training. Every rank takes part.

    kNN is measured if the data have labels; localisation (mean IoU of the encoder's box with the
    best-matching true box, and CorLoc, by `best_threshold`) if they have boxes. Boxes are read as `localise`
    says, whatever guides the crops.
    """

    def __init__(
        self, setting: Setting, config: cfg.Config, data: DataSets, encoder: Backbone, regions: RegionTable,
        online: OnlineProbe | None = None,
    ) -> None:  # fmt: skip
        self.setting, self.views, self.how = setting, config.views, config.localise
        self.neighbours, self.online = config.neighbours, online
        self.data, self.encoder, self.regions = data, encoder, regions
        self.encoder_maps = EncoderMaps(setting, self.views, self.how)
        boxed = data.queries if data.queries is not None and len(data.queries.boxes) else data.train
        self.boxed = boxed.subset(spread_rows(len(boxed))) if len(boxed.boxes) else None
        self.rows = spread_rows(len(data.train), PICTURED)

    def run(self) -> Evaluation:
        """Evaluate the encoder as it is now."""
        scores: dict[str, float] = {}
        localised = None
        if self.data.queries is not None:
            sets = self.data.bank, self.data.queries
            bank, asked = (plain_share(self.setting, self.views, self.encoder, each) for each in sets)
            accuracy = knn_accuracy(*bank, *asked, *self.neighbours)
            scores |= {"knn_top1": accuracy["top1"], "knn_top5": accuracy["top5"]}
            if self.online is not None and self.online.comparable:
                scores |= self.online.score(*bank, *asked)
        if self.boxed is not None:
            boxes = self.encoder_maps.boxes(self.encoder, self.boxed, self.how.map, THRESHOLDS)
            best = best_threshold(boxes, self.boxed)
            scores |= {"iou": best["iou_best"], "corloc": best["corloc"]}
            scores |= {"box_area": best["area"], "box_threshold": best["threshold"]}
            chosen = boxes[THRESHOLDS.index(best["threshold"])]
            localised = Localised(
                self.boxed, chosen, box_scores.best_overlap(chosen, self.boxed), best["threshold"]
            )
        return Evaluation(scores, self._picture() if ranks.is_main() else None, localised)

    def _picture(self) -> Image.Image:
        """A few training images: heatmap as of now, box of the table, views as in training."""
        index, regions = self.data.train.subset(self.rows), self.regions.subset(self.rows)
        views = training_views(self.views)
        options = {**loader_options(self.setting, self.views), "dtype": "float32", "max_bad_share": 1.0}
        loader = ViewLoader(
            index, views, len(index), regions=regions, shuffle=False, rank=0, world=1, **options
        )
        batch = next(iter(loader))
        maps = self.encoder_maps.whole(self.encoder, index, self.how.map)[batch.index.cpu()]
        mean, std = self.views.mean, self.views.std
        drawn = drawings(index, batch, views, regions, heatmaps=maps.numpy(), mean=mean, std=std)
        return sheet([(f"{each.name}  {each.facts}", [*each.images, *each.views]) for each in drawn])


def map_scores(
    encoder_maps: EncoderMaps, network: Method | Backbone, index: SampleIndex, seen: KeptMaps | None = None
) -> dict[str, dict[str, float]]:
    """Scores of the boxes of every kind of map, in this process alone.

    Args:
        index: with true boxes; at most 5,000 of its samples are used, evenly spread.
        seen: maps of its samples that training has kept without a pass, see `OnlineCrop`.

    Returns:
        By row, `best_threshold` of each kind of map, and `localisation` and the median "area" of its boxes by
        each rule that needs no true boxes ("KIND, auto", "KIND, otsu"); `reference` boxes. The rows of `seen`
        also have "agreement", the mean IoU with boxes from the maps of whole images.
    """
    rows = spread_rows(len(index))
    part = index.subset(rows)
    kinds: tuple[cfg.MapKind, ...] = ("activation", "principal")
    if isinstance(network, Method):
        kinds = (*kinds, "gradient")
    free: tuple[Literal["auto", "otsu"], ...] = ("auto", "otsu")
    levels: tuple[Threshold, ...] = (*THRESHOLDS, *free)

    def boxes(maps: Tensor) -> Tensor:
        return torch.stack([boxes_from_maps(maps, level, encoder_maps.shape) for level in levels])

    at: dict[str, Tensor] = {kind: boxes(encoder_maps.whole(network, part, kind)) for kind in kinds}
    if seen is not None:
        at["online"] = boxes(seen.normalised(torch.from_numpy(rows).to(seen.maps.device)).cpu())
    scores: dict[str, dict[str, float]] = {}
    for name, each in at.items():
        scores[name] = best_threshold(each[: -len(free)].numpy(), part)
        for rule, found in zip(free, each[-len(free) :].numpy(), strict=True):
            area = float(np.median(np.prod(found[:, 2:] - found[:, :2], axis=1)))
            scores[f"{name}, {rule}"] = {**localisation(found, part), "area": area}
    if seen is not None:
        level = THRESHOLDS.index(scores["activation"]["threshold"])
        for name, number in (("online", level), ("online, auto", -2), ("online, otsu", -1)):
            agreement = iou(at["online"][number], at["activation"][number]).mean()
            scores[name]["agreement"] = float(agreement)
    return scores | box_scores.reference(part)


def seen_maps(guide: cfg.BoxGuide, saved: Mapping[str, Any], length: int) -> KeptMaps | None:
    """The maps that a checkpoint's guide has kept from views seen in training, if it has any."""
    if not isinstance(guide, cfg.OnlineCrop):
        return None
    state = saved["guide"]
    for outer in ("boxes", "guide"):  # of semantic pairs, and of a control
        state = state.get(outer, state)
    maps = KeptMaps(length, guide.map_size, guide.rate, torch.device("cpu"))
    maps.load_state_dict(state["maps"])
    return maps


def table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """`map_scores` as text."""
    lines = [f"{'':18s} {'threshold':>9s} {'IoU':>7s} {'CorLoc':>8s} {'area':>6s} {'agreement':>10s}"]
    for name, row in scores.items():
        cells = [
            f"{row['threshold']:.1f}" if "threshold" in row else "",
            f"{row['iou_best']:.3f}",
            f"{100 * row['corloc']:.1f} %",
            f"{row['area']:.2f}" if "area" in row else "",
            f"{row['agreement']:.3f}" if "agreement" in row else "",
        ]
        told = " ".join(f"{cell:>{width}s}" for cell, width in zip(cells, (9, 7, 8, 6, 10), strict=True))
        lines.append(f"{name:18s} {told}".rstrip())
    return "\n".join(lines)
