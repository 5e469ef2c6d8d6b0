"""Where the encoder looks: heatmaps of whole images, as in ContrastiveCrop (arXiv 2202.03278)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_views import SampleIndex, recipes
from dali_views.maps.boxes import boxes_from_maps
from dali_views.maps.heatmap import feature_grid, gradient_map, heatmaps
from dali_views.maps.tap import FeatureTap

from .. import config as cfg
from ..data import plain_loader
from ..encoders.backbones import Backbone, look
from ..engine import ranks as distributed
from ..engine.amp import autocast
from ..methods import Method

__all__ = ["Located", "boxes_of", "check_layers", "input_size", "locate"]


class Located(NamedTuple):
    """A batch of localised images."""

    rows: Tensor
    """(B,) rows of the index."""
    maps: Tensor
    """(B, h, w) heatmaps in [0, 1] on the whole image."""


def locate(
    config: cfg.Config,
    network: Method | Backbone,
    index: SampleIndex,
    device: torch.device,
    maps: cfg.Maps,
    kind: cfg.MapKind = "activation",
    alone: bool = False,
) -> Iterator[Located]:
    """Localise this rank's share of an index, or all of it if `alone`.

    As published: eval mode, no gradient to parameters, un-augmented whole images squashed to a square.

    Args:
        network: an encoder; or a method, of which its `encoder` is asked. Maps of kind "gradient" need the
            method: there the backbone that learns is asked by the method's own alignment score, with the
            horizontal mirror image as the other view (ContraCAM, arXiv 2108.00049; the mirror is our choice),
            and where the method has negatives, the other images of the batch are those.
        maps: layer and size of the input; the encoder's last spatial layer and the size of views if absent.
        kind: see `dali_views.maps.heatmap` for "activation" and "principal".

    Raises:
        ValueError: as by `FeatureTap` and `feature_grid`: no such layer, or its output is no map.
    """
    size = input_size(config, maps)
    for batch in plain_loader(config, index, recipes.localisation(size), alone=alone):
        images = batch.views[0].to(device)
        with autocast(config, device):
            if kind == "gradient":
                found = _gradient_maps(network, images, maps.layer)
            else:
                encoder = network.encoder if isinstance(network, Method) else network
                layer = maps.layer or encoder.feature_layer
                found = heatmaps(
                    encoder, images, layer, encoder.prefix_tokens, kind=kind,
                    channels_last=encoder.channels_last_maps,
                )  # fmt: skip
        yield Located(batch.index, found)


def _gradient_maps(network: Method | Backbone, images: Tensor, layer: str | None) -> Tensor:
    if not isinstance(network, Method):
        raise ValueError("maps by gradient need a method with its alignment score, not an encoder alone")
    backbone, training = network.backbone, network.training
    network.eval()
    with FeatureTap(backbone, layer or backbone.feature_layer) as tap, torch.enable_grad():
        score = network.alignment(images, images.flip(3))
        (gradient,) = torch.autograd.grad(score.float().sum(), tap.features)
    network.train(training)
    return gradient_map(*(as_grid(backbone, each) for each in (tap.features, gradient)))


def as_grid(backbone: Backbone, features: Tensor) -> Tensor:
    """What a layer of an encoder gives as maps (B, C, h, w); see `feature_grid`, which raises."""
    return feature_grid(features, backbone.prefix_tokens, channels_last=backbone.channels_last_maps)


def check_layers(config: cfg.Config, backbone: Backbone) -> None:
    """See that an encoder gives the maps that a run's guide and evaluations will ask for, maybe hours later.

    Raises:
        ValueError: it lacks the layer, its output is no map, or images of that size are not taken.
    """
    guide, how = config.box_guide, config.localise
    if isinstance(guide, cfg.Localised):
        # Of maps seen in training, `size` is only what boxes are read off.
        size = config.views.size if isinstance(guide, cfg.OnlineCrop) else input_size(config, guide)
        _check_layer(backbone, guide, size, "guide" if guide is config.guide else "guide.boxes")
    if how.layer is not None or how.size is not None:
        _check_layer(backbone, how, input_size(config, how), "localise")


def _check_layer(backbone: Backbone, maps: cfg.Maps, size: int, key: str) -> None:
    try:
        as_grid(backbone, look(backbone, size, maps.layer or backbone.feature_layer)[1])
    except ValueError as error:
        told = f"{error}".rstrip(".")
        raise ValueError(f"{key}.layer: {told}; set {key}.layer and {key}.size to what fits") from None


def input_size(config: cfg.Config, maps: cfg.Maps) -> int:
    """Pixels to which whole images are squashed before they are localised."""
    return maps.size or config.views.size


def maps_of(
    config: cfg.Config,
    network: Method | Backbone,
    index: SampleIndex,
    device: torch.device,
    maps: cfg.Maps,
    kind: cfg.MapKind,
) -> Tensor:
    """(N, h, w) maps of a whole index, on the CPU, by this process alone. Arguments as of `locate`.

    The map of an image that cannot be read is all ones.
    """
    found = list(locate(config, network, index, device, maps, kind, alone=True))
    known = torch.cat([part.maps for part in found]).float().cpu()
    result = torch.ones(len(index), *known.shape[1:])
    result[torch.cat([part.rows for part in found]).cpu()] = known
    return result


def boxes_of(
    config: cfg.Config,
    network: Method | Backbone,
    index: SampleIndex,
    device: torch.device,
    maps: cfg.Maps,
    kind: cfg.MapKind,
    thresholds: Sequence[float | Literal["otsu"]],
) -> NDArray[np.float32]:
    """(T, N, 4) boxes of a whole index at each threshold, equal on all ranks. Arguments as of `locate`."""
    size = input_size(config, maps)
    rows, boxes = [], []
    for part in locate(config, network, index, device, maps, kind):
        rows.append(part.rows)
        at = [boxes_from_maps(part.maps, threshold, (size, size)) for threshold in thresholds]
        boxes.append(torch.stack(at, dim=1))
    everyone = distributed.gather_rows(torch.cat(rows)).cpu().numpy()
    found = distributed.gather_rows(torch.cat(boxes)).float().cpu().numpy()
    # An image that cannot be read is not among the rows; nothing is known of where its object is.
    result = np.tile(np.array([0, 0, 1, 1], np.float32), (len(thresholds), len(index), 1))
    result[:, everyone] = found.transpose(1, 0, 2)
    return result
