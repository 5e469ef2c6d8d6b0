"""Where the trainer asks the encoder for maps of whole images, as in ContrastiveCrop (arXiv 2202.03278)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_views import SampleIndex, recipes
from dali_views.maps.align import Offset
from dali_views.maps.boxes import Threshold, boxes_from_maps
from dali_views.maps.heatmap import (
    align_maps,
    evaluating,
    feature_grid,
    gradient_map,
    heatmaps,
    layer_offset,
)  # fmt: skip
from dali_views.maps.tap import FeatureTap

from .. import config as cfg
from ..data import plain_loader
from ..encoders.backbones import Backbone, look
from ..engine import ranks
from ..engine.setting import Setting
from ..methods import Method

__all__ = ["EncoderMaps", "Located", "as_grid", "check_layers"]


class Located(NamedTuple):
    rows: Tensor  # (B,) of the index
    maps: Tensor  # (B, h, w) heatmaps in [0, 1] on the whole image


@dataclass(frozen=True)
class EncoderMaps:
    """Heatmaps in eval mode of whole images squashed to a square, as published; no gradient to parameters.

    `network` below is an encoder, or a method, whose `encoder` is used. Kinds of maps: see
    `dali_views.maps.heatmap` for "activation" and "principal". "gradient" needs a method: its own alignment
    score is differentiated in the backbone that learns; the other view is the horizontal mirror image, and
    negatives are the other images of the batch (ContraCAM, arXiv 2108.00049; the mirror is our choice).

    All raise a ValueError as `FeatureTap` and `feature_grid`: no such layer, or its output is no map.
    """

    setting: Setting
    views: cfg.Views
    how: cfg.Maps
    """Layer and size of the input; if absent, the encoder's last spatial layer and the size of views."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels to which whole images are squashed."""
        size = self.how.size or self.views.size
        return size, size

    def located(
        self, network: Method | Backbone, index: SampleIndex, kind: cfg.MapKind, alone: bool = False
    ) -> Iterator[Located]:
        """Maps of this rank's share of an index, or of all of it if `alone`."""
        shown = recipes.localisation(self.shape[0])
        for batch in plain_loader(self.setting, self.views, index, shown, alone):
            images = batch.views[0].to(self.setting.device)
            with self.setting.autocast():
                if kind == "gradient":
                    maps = _gradient_maps(network, images, self.how)
                else:
                    net = network.encoder if isinstance(network, Method) else network
                    maps = heatmaps(
                        net, images, self.how.layer or net.feature_layer, net.prefix_tokens, kind=kind,
                        channels_last=net.channels_last_maps, aligned=self.how.aligned,
                    )  # fmt: skip
            yield Located(batch.index, maps)

    def whole(self, network: Method | Backbone, index: SampleIndex, kind: cfg.MapKind) -> Tensor:
        """(N, h, w) maps of an index, on the CPU, by this process alone; all ones for unreadable images."""
        parts = list(self.located(network, index, kind, alone=True))
        known = torch.cat([part.maps for part in parts]).float().cpu()
        maps = torch.ones(len(index), *known.shape[1:])
        maps[torch.cat([part.rows for part in parts]).cpu()] = known
        return maps

    def boxes(
        self, network: Method | Backbone, index: SampleIndex, kind: cfg.MapKind,
        thresholds: Sequence[Threshold],
    ) -> NDArray[np.float32]:  # fmt: skip
        """(T, N, 4) boxes of a whole index at each threshold, equal on all ranks."""
        rows, boxes = [], []
        for part in self.located(network, index, kind):
            rows.append(part.rows)
            at = [boxes_from_maps(part.maps, threshold, self.shape) for threshold in thresholds]
            boxes.append(torch.stack(at, dim=1))
        everyone = ranks.gather_rows(torch.cat(rows)).cpu().numpy()
        found = ranks.gather_rows(torch.cat(boxes)).float().cpu().numpy()
        # Unreadable images are not among the rows; their boxes stay the whole image.
        result = np.tile(np.array([0, 0, 1, 1], np.float32), (len(thresholds), len(index), 1))
        result[:, everyone] = found.transpose(1, 0, 2)
        return result


def _gradient_maps(network: Method | Backbone, images: Tensor, how: cfg.Maps) -> Tensor:
    if not isinstance(network, Method):
        raise ValueError("maps by gradient need a method with its alignment score, not an encoder alone")
    backbone = network.backbone
    layer = how.layer or backbone.feature_layer
    with evaluating(network), FeatureTap(backbone, layer) as tap, torch.enable_grad():
        # The images ask for a gradient, because the stages before the layer may be frozen.
        score = network.alignment(images.detach().requires_grad_(), images.flip(3))
        (gradient,) = torch.autograd.grad(score.float().sum(), tap.features)
    maps = gradient_map(*(as_grid(backbone, each) for each in (tap.features, gradient)))
    return align_maps(maps, offset_of(backbone, layer, images)) if how.aligned else maps


def offset_of(backbone: Backbone, layer: str, images: Tensor) -> Offset | None:
    """How far the maps of an encoder's layer lie beside images (B, 3, H, W) of this shape."""
    last = backbone.channels_last_maps
    return layer_offset(backbone, images, layer, backbone.prefix_tokens, channels_last=last)


def as_grid(backbone: Backbone, features: Tensor) -> Tensor:
    """The output of an encoder's layer as maps (B, C, h, w); see `feature_grid`, which raises."""
    return feature_grid(features, backbone.prefix_tokens, channels_last=backbone.channels_last_maps)


def check_layers(config: cfg.Config, backbone: Backbone) -> None:
    """Check that an encoder gives the maps that guide and evaluations will need, perhaps hours later.

    Raises:
        ValueError: it lacks a layer, its output is no map, or it does not accept images of that size. Names
            every such key, and for a missing layer of another family the one whose stride is nearest.
    """
    guide, how, size = config.box_guide, config.localise, config.views.size
    asked: list[tuple[str, cfg.Maps, int]] = []
    if isinstance(guide, cfg.Read) and getattr(guide, "encoder", "untrained") == "untrained":
        key, sizes = "guide" if guide is config.guide else "guide.boxes", {guide.size or size}
        if isinstance(guide, cfg.OnlineCrop):
            # Whole images are seen in the first pass only; all other maps are of the views.
            sizes = {size} | (sizes if guide.warmup == 0 else set())
        asked += [(key, guide, each) for each in sorted(sizes)]
    if how.layer is not None or how.size is not None:
        asked.append(("localise", how, how.size or size))
    wrong: dict[str, tuple[str, str]] = {}  # what is wrong, and the remedy
    for key, maps, each in asked:
        layer = maps.layer or backbone.feature_layer
        try:
            as_grid(backbone, look(backbone, each, layer)[1])
        except ValueError as error:
            near = _same_stride(backbone, layer, each)
            told = f"{error}".partition(";")[0] if near else f"{error}"
            remedy = f"{key}.layer={near}" if near else f"{key}.layer and {key}.size to what fits"
            wrong.setdefault(key, (f"{key}.layer: {told.rstrip('.')}", remedy))
    if wrong:
        told, remedies = ("; ".join(each) for each in zip(*wrong.values(), strict=True))
        raise ValueError(f"{told}; set {remedies.replace('; ', ' ')}")


def _same_stride(backbone: Backbone, layer: str, size: int) -> str:
    """The layer whose stride on images of `size` pixels is nearest to that of a layer of this name in a
    ResNet or ConvNeXt; empty if the encoder has `layer`, or if the name says no stride."""
    names = dict(backbone.named_modules())
    stage = re.fullmatch(r"layer([1-4])|stages\.([0-3])", layer)
    if layer in names or stage is None:
        return ""
    number = int(stage[1] or int(stage[2]) + 1)
    ends = backbone.stage_ends or [name for name in names if name.count(".") <= 1]
    found = []
    for place, name in enumerate(ends, 1):
        with suppress(ValueError):  # its output is no map
            cells = as_grid(backbone, look(backbone, size, name)[1]).shape[-1]
            # Of equal strides, as all of a transformer, the one of the same depth.
            found.append(
                (abs(math.log2(size / cells) - number - 1), abs(place / len(ends) - number / 4), name)
            )
    return min(found)[2] if found else ""
