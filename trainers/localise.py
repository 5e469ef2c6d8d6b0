"""Where the encoder looks: boxes and heatmaps of whole images, as in ContrastiveCrop (arXiv 2202.03278)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_views import SampleIndex, recipes
from dali_views.saliency import FeatureTap, boxes_from_maps, heatmaps
from dali_views.salient_regions import gradient_map

from . import config as cfg
from . import distributed
from .amp import autocast
from .backbones import Backbone
from .data import plain_loader
from .methods import Method

__all__ = ["Located", "boxes_of", "guide_of", "locate", "locate_by_gradient"]


class Located(NamedTuple):
    """A batch of localised images."""

    rows: Tensor
    """(B,) rows of the index."""
    boxes: Tensor
    """(B, 4) y0, x0, y1, x1 as fractions of the image."""
    maps: Tensor
    """(B, h, w) heatmaps in [0, 1] on the whole image."""


def locate(
    config: cfg.Config, encoder: Backbone, index: SampleIndex, device: torch.device, alone: bool = False
) -> Iterator[Located]:
    """Localise this rank's share of an index, or all of it if `alone`.

    As published: eval mode, no gradient, un-augmented whole images squashed to a square; the activation sum
    of the last stage is min-max normalised, upsampled to the input and thresholded. Size, layer and threshold
    are the guide's if the run has ContrastiveCrop, else that guide's defaults at the size of the views.
    """
    guide = guide_of(config)
    size = guide.size or config.views.size
    layer = guide.layer or encoder.feature_layer
    for batch in plain_loader(config, index, recipes.localisation(size), alone=alone):
        with autocast(config, device):
            maps = heatmaps(encoder, batch.views[0].to(device), layer)
        yield Located(batch.index, boxes_from_maps(maps, guide.threshold, (size, size)), maps)


def locate_by_gradient(
    config: cfg.Config, method: Method, index: SampleIndex, device: torch.device
) -> Iterator[Located]:
    """As `locate`, but the map weighs channels by the gradient of the method's own alignment score.

    ContraCAM's form (arXiv 2108.00049), with the horizontal mirror image as the other view (our choice).
    Parameters get no gradient.
    """
    guide = guide_of(config)
    size = guide.size or config.views.size
    layer = guide.layer or method.backbone.feature_layer
    training = method.training
    for batch in plain_loader(config, index, recipes.localisation(size)):
        images = batch.views[0].to(device)
        method.eval()
        with autocast(config, device), FeatureTap(method.backbone, layer) as tap, torch.enable_grad():
            score = method.alignment(images, images.flip(3))
            (gradient,) = torch.autograd.grad(score.float().sum(), tap.features)
            maps = gradient_map(tap.features.detach(), gradient)
        method.train(training)
        yield Located(batch.index, boxes_from_maps(maps, guide.threshold, (size, size)), maps)


def guide_of(config: cfg.Config) -> cfg.ContrastiveCrop:
    """Size, layer and threshold of localisation: the run's guide's, or the defaults."""
    return config.guide if isinstance(config.guide, cfg.ContrastiveCrop) else cfg.ContrastiveCrop()


def boxes_of(
    config: cfg.Config, encoder: Backbone, index: SampleIndex, device: torch.device
) -> NDArray[np.float32]:
    """(N, 4) boxes of a whole index, equal on all ranks."""
    found = list(locate(config, encoder, index, device))
    rows = distributed.gather_rows(torch.cat([part.rows for part in found]))
    boxes = distributed.gather_rows(torch.cat([part.boxes for part in found]))
    result = np.empty((len(index), 4), np.float32)
    result[rows.cpu().numpy()] = boxes.float().cpu().numpy()
    return result
