"""stable-pretraining's speed test: Barlow Twins on a ViT-S/16, two equal views, batches of 256, bfloat16.

Its repository has figures for one H200, 8 workers and Imagenette (benchmarks/imagenet10/RESULTS.md): 342
images/s with torchvision's augmentations in the workers, 871 with Kornia's on the GPU. Encoder, projector,
loss, optimiser and views are the published ones; images and machine are the user's.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ...plan import recipes
from ...plan.views import View

NAME = "barlow_vit_s16"
"""Its name among the models to train."""
REPORTED = {"torchvision in workers": 342, "Kornia on the device": 871}
"""Images per second on one H200, by where views are made."""
_WIDTH, _OFF_DIAGONAL = 2048, 5.1e-3


def views(size: int) -> list[View]:
    """Two views as of MoCo v2, with smaller crops and half the saturation."""
    return [replace(view, saturation=0.2) for view in recipes.moco_v2(size, scale=(0.08, 1.0))]


def network() -> nn.Module:
    """Encoder and projector, from views (B, 3, S, S) with S a multiple of 16 to embeddings (B, 2048)."""
    if find_spec("timm") is None:
        raise ValueError(f"The model {NAME} needs timm; pip install timm, or leave it out of --models.")
    import timm

    encoder = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True)
    layers: list[nn.Module] = [encoder]
    for width in (encoder.num_features, _WIDTH):
        layers += [nn.Linear(width, _WIDTH, bias=False), nn.BatchNorm1d(_WIDTH), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(_WIDTH, _WIDTH, bias=False))


def loss(first: Tensor, second: Tensor) -> Tensor:
    """Barlow Twins' loss of two embeddings (B, D) (arXiv 2103.03230, equation 1): their correlation over the
    batch is drawn to the identity."""
    a, b = ((each - each.mean(0)) / (each.std(0) + 1e-5) for each in (first.float(), second.float()))
    squares = (a.T @ b / len(a) - torch.eye(a.shape[1], device=a.device)).square()
    diagonal = squares.diagonal().sum()
    return diagonal + _OFF_DIAGONAL * (squares.sum() - diagonal)


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the page's settings."""
    return torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
