"""SCFS: every local crop searches the global view's feature maps for what it shows (arXiv 2212.06486)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dali_views.maps.heatmap import feature_grid
from dali_views.maps.tap import FeatureTap
from trainers import config as cfg
from trainers.encoders.backbones import Backbone, look
from trainers.engine.optim import Clock, cosine
from trainers.methods.dino import DINO, GLOBAL, across_views, cross_entropy, global_and_local, per_view
from trainers.methods.networks import Centre, ema_update, momentum_copy, normalise

__all__ = ["SCFS", "LayerHead", "Stages", "feature_search"]


def feature_search(queries: Tensor, features: Tensor) -> Tensor:
    """Feature maps weighted by their similarity with a query (section 3.2): A * F, A = cos(q, F[h, w]).

    A plain cosine: no softmax, no temperature, no threshold.

    Args:
        queries: (L, B, C), one per local crop and sample.
        features: (B, C, h, w), the same samples' map to search; the result is (L, B, C, h, w).
    """
    with torch.autocast(features.device.type, enabled=False):
        keys, units = normalise(features), normalise(queries.flatten(0, 1)).view(queries.shape)
        attention = torch.einsum("lbc,bchw->lbhw", units.to(keys.dtype), keys).to(features.dtype)
        # The product lies in memory as its first factor does, and then as `features`: channels_last stays.
        return attention.contiguous().unsqueeze(2) * features


class LayerHead(nn.Module):
    """Residual bottleneck, average pooling and a projector: maps (N, C, h, w) -> unit vectors (N, output).

    The unit vectors are logits. Widths are the public code's.
    """

    def __init__(self, channels: int, bottleneck: int, hidden: int, output: int) -> None:
        super().__init__()
        self.bottleneck = nn.Sequential(
            nn.Conv2d(channels, bottleneck, 1, bias=False),
            nn.BatchNorm2d(bottleneck),
            nn.ReLU(inplace=True),
            nn.Conv2d(bottleneck, bottleneck, 3, padding=1, bias=False),
            nn.BatchNorm2d(bottleneck),
            nn.ReLU(inplace=True),
            nn.Conv2d(bottleneck, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.projector = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, output),
            nn.BatchNorm1d(output),
        )

    def forward(self, features: Tensor) -> Tensor:
        pooled = (features + self.bottleneck(features)).relu().mean(dim=(2, 3))
        return normalise(self.projector(pooled))


class Stages:
    """A backbone that also returns the maps of some layers.

    Not a module: the owner of the backbone keeps its parameters. Hooks are copied with a network, so make a
    momentum copy before.

    Args:
        layers: dotted names of layers; each gives a map (B, C, h, w), or tokens (B, T, C) in row order
            after the class and register tokens, which are dropped. A ValueError if there is no such layer.
    """

    def __init__(self, backbone: Backbone, layers: Sequence[str]) -> None:
        self.backbone = backbone
        self.taps = [FeatureTap(backbone, layer) for layer in layers]

    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images (B, 3, S, S) -> pooled features (B, dim) and a map (B, C, h, w) per layer."""
        pooled = self.backbone(images)
        return pooled, [self._as_map(tap) for tap in self.taps]

    def channels(self) -> list[int]:
        """Channels C of each layer's map, measured on one empty image."""
        # Transformers accept only the size that they are made for; for others a small image is quicker.
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


class SCFS(DINO):
    """DINO's loss plus one loss per searched layer, all of weight 1 (section 3.3 and the public code).

    A layer's loss is the mean of two: the global views against each other, centred, and every local crop
    against what it found in the teacher's map of the first global view, not centred. `method.losses` leaves
    some out. Batch norm of the heads sees the local crops as one batch, the global views as another, as in
    the public code.
    """

    def __init__(self, backbone: Backbone, config: cfg.SCFS) -> None:
        super().__init__(backbone, config)
        layers = config.layers or backbone.stage_layers
        if not layers:
            raise ValueError(
                f"no stages of {type(backbone).__name__} are known; "
                "name the layers to search by method.layers"
            )
        # After DINO has made its copies, because hooks are copied too.
        self._student, self._teacher = (Stages(net, layers) for net in (backbone, self.teacher_backbone))
        widths = config.layer_bottleneck, config.layer_hidden, config.layer_output
        channels = self._student.channels() if {"global", "search"} & set(config.losses) else ()
        self.layer_heads = nn.ModuleList(LayerHead(count, *widths) for count in channels)
        self.teacher_layer_heads = momentum_copy(self.layer_heads)
        self.layer_centres = nn.ModuleList(
            Centre(config.layer_output, config.centre_momentum) for _ in self.layer_heads
        )
        self.losses = config.losses
        self.head.requires_grad_("final" in self.losses)

    def check_views(self, sizes: Sequence[int]) -> None:
        super().check_views(sizes)
        if len(sizes) == GLOBAL and "search" in self.losses:
            raise ValueError("SCFS searches with local views, and there is none; set views.locals above 0")

    def forward(self, views: list[Tensor], kin: Tensor | None = None) -> Tensor:
        first, *rest = global_and_local(self.checked(views))
        with torch.no_grad():
            target, target_maps = self._teacher(first)
        found = [self._student(images) for images in (first, *rest)]
        losses, self.embedding = target.new_zeros(len(views[0])), target[: len(views[0])]
        if "final" in self.losses:
            student = self.student_logits(torch.cat([pooled for pooled, _ in found]))
            losses = self.final_loss(self.teacher_logits(target), student, len(views[0]))
        for layer in range(len(self.layer_heads)):
            losses = losses + self.layer_loss(layer, target_maps[layer], *(maps[layer] for _, maps in found))
        return self.config.loss_scale * losses

    def layer_loss(self, layer: int, target_map: Tensor, *maps: Tensor) -> Tensor:
        """Losses (B,) of one layer, from the teacher's map of the global views (2B, C, h, w) and the
        student's of them and of the local ones (L * B, C, h', w'), if there are any."""
        samples = len(target_map) // GLOBAL
        loss = target_map.new_zeros(samples, dtype=torch.float32)
        if "global" in self.losses:
            with torch.no_grad():
                centred = self.layer_centres[layer](self.teacher_layer_heads[layer](target_map))
            own = self.layer_heads[layer](maps[0]) / self.config.student_temperature
            loss = loss + across_views(per_view(centred / self.temperature, samples), per_view(own, samples))
        if "search" in self.losses:
            with torch.no_grad():
                queries = per_view(maps[1].mean(dim=(2, 3)), samples)
                found = feature_search(queries, target_map[:samples]).flatten(0, 1)
                searched = self.teacher_layer_heads[layer](found) / self.temperature
            local = self.layer_heads[layer](maps[1]) / self.config.student_temperature
            loss = loss + cross_entropy(searched, local).view(-1, samples).mean(dim=0)
        return loss / 2

    def after_step(self, clock: Clock) -> None:
        super().after_step(clock)
        momentum = cosine(clock.share, self.config.momentum, self.config.final_momentum)
        ema_update(self.teacher_layer_heads, self.layer_heads, momentum)
        for centre in self.layer_centres:
            cast(Centre, centre).update()
