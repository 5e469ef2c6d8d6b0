"""Where the trainer asks the encoder for maps of whole images, as in ContrastiveCrop (arXiv 2202.03278)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        ValueError: it lacks the layer, its output is no map, or it does not accept images of that size.
    """
    guide, how, size = config.box_guide, config.localise, config.views.size
    if isinstance(guide, cfg.Read) and getattr(guide, "encoder", "untrained") == "untrained":
        key, sizes = "guide" if guide is config.guide else "guide.boxes", {guide.size or size}
        if isinstance(guide, cfg.OnlineCrop):
            # Whole images are seen in the first pass only; all other maps are of the views.
            sizes = {size} | (sizes if guide.warmup == 0 else set())
        for each in sorted(sizes):
            _check_layer(backbone, guide, each, key)
    if how.layer is not None or how.size is not None:
        _check_layer(backbone, how, how.size or size, "localise")


def _check_layer(backbone: Backbone, maps: cfg.Maps, size: int, key: str) -> None:
    try:
        as_grid(backbone, look(backbone, size, maps.layer or backbone.feature_layer)[1])
    except ValueError as error:
        told = f"{error}".rstrip(".")
        raise ValueError(f"{key}.layer: {told}; set {key}.layer and {key}.size to what fits") from None
