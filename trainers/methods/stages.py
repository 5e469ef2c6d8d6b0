"""The feature maps inside a backbone, beside the pooled features that come out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dali_views.feature_tap import FeatureTap
from trainers.backbones import Backbone

__all__ = ["Stages"]


class Stages:
    """A backbone called so that the maps of some layers come out too.

    Not a module: whoever owns the backbone keeps its parameters. Hooks are copied with a network, so a
    momentum copy is to be made before.

    Args:
        backbone: any encoder.
        layers: dotted names of its layers; each gives a map (B, C, h, w), or tokens (B, T, C) in row order
            after the class and register tokens, which are dropped.

    Raises:
        ValueError: there is no such layer.
    """

    def __init__(self, backbone: Backbone, layers: Sequence[str]) -> None:
        self.backbone = backbone
        self.taps = [FeatureTap(backbone, layer) for layer in layers]
        self.prefix = backbone.prefix_tokens

    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images (B, 3, S, S) -> pooled features (B, dim) and a map (B, C, h, w) per layer."""
        pooled = self.backbone(images)
        return pooled, [self._as_map(tap) for tap in self.taps]

    @torch.no_grad()
    def channels(self) -> list[int]:
        """Channels C of each layer's map, found by a look at one empty image."""
        # Transformers may take 224 pixels only; for others less is quicker.
        size = 224 if hasattr(self.backbone, "class_token") or hasattr(self.backbone, "cls_token") else 64
        training = self.backbone.training
        self.backbone.eval()  # so that running statistics do not see it
        parameter = next(self.backbone.parameters())
        _, maps = self(torch.zeros(1, 3, size, size, device=parameter.device))
        self.backbone.train(training)
        return [found.shape[1] for found in maps]

    def _as_map(self, tap: FeatureTap) -> Tensor:
        features = tap.features
        if features.ndim == 4:
            return features
        side = math.isqrt(max(0, features.shape[1] - self.prefix)) if features.ndim == 3 else 0
        if not side or side * side + self.prefix != features.shape[1]:
            raise ValueError(
                f"layer {tap.layer} gives {tuple(features.shape)}, which is neither a map (B, C, h, w) nor "
                f"{self.prefix} + h x h tokens; name other layers by method.layers"
            )
        return features[:, self.prefix :].transpose(1, 2).reshape(len(features), -1, side, side)
