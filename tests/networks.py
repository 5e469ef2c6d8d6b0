"""Networks small enough to follow by hand, and batches for them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from trainers import config as cfg
from trainers.encoders.backbones import Backbone
from trainers.methods import Method, build_method

# Every method at a size for tests. None has batch norm in its head where it can be left out.
SMALL: dict[str, Any] = {
    "simclr": cfg.SimCLR(bn=False, output_dim=6),
    "moco": cfg.MoCo(hidden_dim=0, output_dim=4, queue=10, symmetric=True),
    "byol": cfg.BYOL(hidden_dim=8, output_dim=6),
    "simsiam": cfg.SimSiam(hidden_dim=8, output_dim=6, predictor_dim=4),
    "dino": cfg.DINO(hidden_dim=8, bottleneck_dim=6, output_dim=12, freeze_last_layer=0),
    "scfs": cfg.SCFS(
        hidden_dim=8, bottleneck_dim=6, output_dim=12, freeze_last_layer=0, layers=("0", "2"),
        layer_bottleneck=4, layer_hidden=8, layer_output=5,
    ),
    "lejepa": cfg.LeJEPA(hidden_dim=8, output_dim=4, directions=12),
}  # fmt: skip


def tiny_backbone(norm: bool = False) -> Backbone:
    """Two convolutions, eight features; the same weights every time."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    if norm:
        layers.append(nn.BatchNorm2d(8))
    net: Any = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.dim, net.feature_layer, net.prefix_tokens, net.stage_layers = 8, "2", 0, ("0", "2")
    net.channels_last_maps = False
    return cast(Backbone, net)


def small_method(name: str, norm: bool = False) -> Method:
    """A method of `SMALL` around `tiny_backbone`; the same weights every time."""
    backbone = tiny_backbone(norm)
    torch.manual_seed(1)
    return build_method(SMALL[name], backbone)


def without_batch_norm(method: Method) -> Method:
    """The method with every batch norm replaced by the identity, in place."""
    for module in list(method.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
                setattr(module, name, nn.Identity())
    return method


def views_for(name: str, samples: int, size: int = 8, seed: int = 7) -> list[Tensor]:
    """Random views of the number that a method wants: two, and two local ones for SCFS and DINO."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size, size, size - 2, size - 2] if name in ("dino", "scfs", "lejepa") else [size, size]
    return [torch.randn(samples, 3, side, side, generator=generator) for side in sizes]
