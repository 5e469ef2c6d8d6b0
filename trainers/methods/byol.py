"""BYOL: a predictor guesses what a slow copy of the network sees in the other view (arXiv 2006.07733)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from trainers import config as cfg
from trainers.encoders.backbones import Backbone
from trainers.engine.optim import Clock, cosine
from trainers.methods.method import Method
from trainers.methods.networks import ema_update, momentum_copy, normalise, projector

__all__ = ["BYOL", "squared_distance"]


def squared_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """|p - z|^2 = 2 - 2 cos(p, z) per row of vectors (B, D), which are normalised here."""
    return 2 - 2 * (normalise(prediction) * normalise(target)).sum(dim=1)


class BYOL(Method):
    """Online network, predictor and target network; both directions are summed.

    The target starts as a copy of the online network; the share of itself that it keeps at each step goes
    from `momentum` to `final_momentum` by half a cosine (section 3.2). Batch norm sees each view as its own
    batch, as published; the target's batch norm computes its own statistics.
    """

    def __init__(self, backbone: Backbone, config: cfg.BYOL) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector(backbone.dim, config.hidden_dim, config.output_dim, bn=True)
        self.predictor = projector(config.output_dim, config.hidden_dim, config.output_dim, bn=True)
        self.target_backbone = momentum_copy(self.backbone)
        self.target_projector = momentum_copy(self.projector)
        self.momentum = config.momentum, config.final_momentum
        self.loss_scale = config.loss_scale

    def forward(self, views: list[Tensor], kin: Tensor | None = None) -> Tensor:
        first, second = self.checked(views)
        online = [self.projector(self.backbone(view)) for view in (first, second)]
        self.embedding = online[0].detach()
        one, two = (self.predictor(z) for z in online)
        target_one, target_two = self._targets(first), self._targets(second)
        return self.loss_scale * (squared_distance(one, target_two) + squared_distance(two, target_one))

    def alignment(self, images: Tensor, other: Tensor) -> Tensor:
        guess = self.predictor(self.projector(self.backbone(images)))
        return -squared_distance(guess, self._targets(other))

    def after_step(self, clock: Clock) -> None:
        momentum = cosine(clock.share, *self.momentum)
        ema_update(self.target_backbone, self.backbone, momentum)
        ema_update(self.target_projector, self.projector, momentum)

    @property
    def momentum_encoder(self) -> Backbone:
        return self.target_backbone

    @torch.no_grad()
    def _targets(self, view: Tensor) -> Tensor:
        return cast(Tensor, self.target_projector(self.target_backbone(view)))
