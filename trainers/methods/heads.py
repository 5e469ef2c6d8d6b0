"""Between backbone and loss: projectors, predictors, prototypes, unit vectors."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PrototypeHead", "normalise", "projector", "simsiam_projector"]


def projector(dim: int, hidden: int | None, output: int, bn: bool) -> nn.Sequential:
    """Linear, optional batch norm, ReLU, Linear: projectors, and the predictors of BYOL and SimSiam.

    Args:
        dim, hidden, output: widths; `hidden` None: `dim`; 0: a single linear layer.
        bn: batch norm after the hidden layer (SimCLR, BYOL, SimSiam; not MoCo v2 and ContrastiveCrop).
    """
    if hidden == 0:
        return nn.Sequential(nn.Linear(dim, output))
    hidden = dim if hidden is None else hidden
    norm = [nn.BatchNorm1d(hidden)] if bn else []
    return nn.Sequential(
        nn.Linear(dim, hidden, bias=not bn), *norm, nn.ReLU(inplace=True), nn.Linear(hidden, output)
    )


def simsiam_projector(dim: int, hidden: int, output: int) -> nn.Sequential:
    """Three times Linear and batch norm, with ReLU between; the last norm has no scale and no shift."""
    layers: list[nn.Module] = []
    for wide, narrow in ((dim, hidden), (hidden, hidden)):
        layers += [nn.Linear(wide, narrow, bias=False), nn.BatchNorm1d(narrow), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(hidden, output, bias=False), nn.BatchNorm1d(output, affine=False))


class PrototypeHead(nn.Module):
    """DINO's head: three linear layers with GELU, a unit vector, its cosines with the prototypes.

    Normalised prototypes are weight norm with lengths fixed at 1 (the code's norm_last_layer).
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int, bn: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for wide, narrow in pairwise((dim, hidden, hidden)):
            layers += [nn.Linear(wide, narrow), *([nn.BatchNorm1d(narrow)] if bn else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, dim) -> logits (B, prototypes), float32; the product is in the run's precision."""
        return full(F.linear(normalise(self.mlp(features)), F.normalize(self.last_layer.weight, dim=1)))


def full(x: Tensor) -> Tensor:
    """At least float32: half precision is too coarse for the losses."""
    return x.float() if x.element_size() < 4 else x


def normalise(z: Tensor) -> Tensor:
    """Rows of length 1, in full precision."""
    return F.normalize(full(z), dim=1)
