"""An encoder that does not learn, and its features of a set of images."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dali_views import SampleIndex

from .. import config as cfg
from ..data import evaluation_views, plain_loader
from ..engine.setting import Setting
from ..evaluate.knn import extract
from ..saved_run import encoder_of, load_run
from .backbones import Backbone
from .weights import library_encoder

__all__ = ["embed", "frozen_encoder"]

_PART = 16384  # images whose features are held in float32 at a time


def frozen_encoder(views: cfg.Views, source: str | Path, device: torch.device) -> tuple[Backbone, cfg.Views]:
    """An encoder to measure similarity with, and the views to `embed` with.

    Nothing is downloaded: pretrained weights are those of a file or of the library's cache, and torch's
    random numbers go on as if nothing had been built. The paper's encoder learnt without labels;
    torchvision's learnt from ImageNet's, and so did most of timm's.

    Args:
        source: a run folder or its last.pt; "torchvision:NAME" (its default weights) or "timm:NAME", from the
            cache; or "torchvision:NAME:FILE" or "timm:NAME:FILE", where the file holds a state dict of that
            model, see `load_weights`.

    Returns:
        The encoder in eval mode, without gradients, on `device`; and `views` with the size and
        normalisation that this encoder was trained with: for a library's those of its own weights
        of this name, whatever the file.

    Raises:
        FileNotFoundError: the folder holds no checkpoint, or there is no such file.
        ValueError: the library has no such model, its weights are not on this machine, or the file does not
            hold them.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        found = library_encoder(str(source))
        if found is None:
            _, run, saved = load_run(Path(source))
            like = {key: getattr(run.views, key) for key in ("size", "mean", "std")}
            found = encoder_of(run, saved, "trained", device), like
    encoder, like = found
    encoder.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return encoder, views.model_copy(update=like)


@torch.no_grad()
def embed(setting: Setting, views: cfg.Views, encoder: Backbone, index: SampleIndex) -> Tensor:
    """Features of the plain central view of every image, in the order of the index, equal on all ranks.

    Peak memory on the device, beside the network and a batch of at most 256 images, is 2 N D + 16 P D bytes,
    where P = min(N, 16384), or the batches of all ranks if that is more: 5.2 GB + 0.5 GB for ImageNet's
    N = 1,281,167 and D = 2048.

    Returns:
        (N, D) float16 on `device`, rows of length 1. An image that cannot be read has a row of zeros.
    """

    def unit(images: Tensor) -> Tensor:
        with setting.autocast():
            features = encoder(images)
        return F.normalize(features.float(), dim=1)

    loader = plain_loader(setting, views, index, evaluation_views(views))
    batches, at_a_time = iter(loader), max(1, _PART // loader.global_batch)
    training = encoder.training
    encoder.eval()
    whole = torch.zeros(0, dtype=torch.float16, device=setting.device)
    for _ in range(0, len(loader), at_a_time):
        features, _, rows = extract(unit, islice(batches, at_a_time), setting.device)
        if not len(whole):
            whole = whole.new_zeros(len(index), features.shape[1])
        whole[rows] = features.half()
    encoder.train(training)
    return whole
