"""The feature maps inside a backbone, beside the pooled features that come out of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dali_views.maps.heatmap import feature_grid
from dali_views.maps.tap import FeatureTap
from trainers.encoders.backbones import Backbone, look

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

    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images (B, 3, S, S) -> pooled features (B, dim) and a map (B, C, h, w) per layer."""
        pooled = self.backbone(images)
        return pooled, [self._as_map(tap) for tap in self.taps]

    def channels(self) -> list[int]:
        """Channels C of each layer's map, found by a look at one empty image."""
        # Transformers take the size that they are made for; for others less is quicker.
        net = self.backbone
        fixed = hasattr(net, "class_token") or hasattr(net, "cls_token") or net.channels_last_maps
        size = int(getattr(net, "default_cfg", {}).get("input_size", (224,))[-1]) if fixed else 64
        look(net, size)
        return [self._as_map(tap).shape[1] for tap in self.taps]

    def _as_map(self, tap: FeatureTap) -> Tensor:
        net = self.backbone
        try:
            return feature_grid(tap.features, net.prefix_tokens, channels_last=net.channels_last_maps)
        except ValueError as error:
            told = f"{error}".rstrip(".")
            raise ValueError(f"layer {tap.layer}: {told}; name other layers by method.layers") from None
