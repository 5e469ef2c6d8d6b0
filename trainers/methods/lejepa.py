"""LeJEPA: views agree, and embeddings follow a normal law, which prevents collapse (arXiv 2511.08544)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dali_views.system.ranks import to_device
from trainers import config as cfg
from trainers.encoders.backbones import Backbone
from trainers.engine import ranks
from trainers.engine.optim import Clock
from trainers.methods.dino import GLOBAL, check_multi_crop, global_and_local, per_view
from trainers.methods.method import Method, log_ratio
from trainers.methods.networks import full, normalise

__all__ = ["LeJEPA", "epps_pulley"]

POINTS, FARTHEST = 17, 3.0  # where characteristic functions are compared, as in the authors' code


def epps_pulley(samples: Tensor) -> Tensor:
    """How far samples (N, ...) are from N(0, 1) along the first dimension: the Epps-Pulley statistic (...).

        T = N * integral over t of |mean of exp(i t x) - exp(-t^2 / 2)|^2 exp(-t^2 / 2)

    The trapezoid rule on 17 points from 0 to 3, twice, for the integrand is even. 0 only for the normal law.
    """
    t = torch.linspace(0, FARTHEST, POINTS, device=samples.device, dtype=samples.dtype)
    normal = (-t.square() / 2).exp()
    phases = samples.unsqueeze(-1) * t
    gap = (phases.cos().mean(dim=0) - normal).square() + phases.sin().mean(dim=0).square()
    return 2 * len(samples) * torch.trapezoid(gap * normal, dx=FARTHEST / (POINTS - 1))


class LeJEPA(Method):
    """(1 - weight) * distance of all views from the mean of the global ones + weight * SIGReg (algorithm 2).

    SIGReg is the mean of `epps_pulley` over views and over random directions, drawn anew at every step and
    equal on all ranks, of the embeddings of all ranks. It belongs to the batch: every sample's loss has it.
    There is no momentum network, no stop of gradients and no predictor.
    """

    in_batch = "regularised embeddings"
    directions: Tensor

    def __init__(self, backbone: Backbone, config: cfg.LeJEPA) -> None:
        super().__init__()
        self.backbone, self.config = backbone, config
        layers: list[nn.Module] = []
        for wide, narrow in pairwise((backbone.dim, config.hidden_dim, config.hidden_dim)):
            layers += [nn.Linear(wide, narrow), nn.BatchNorm1d(narrow), nn.ReLU(inplace=True)]
        self.projector = nn.Sequential(*layers, nn.Linear(config.hidden_dim, config.output_dim))
        self.register_buffer("directions", self._drawn(0), persistent=False)

    def check_views(self, sizes: Sequence[int]) -> None:
        check_multi_crop(self, sizes)

    def before_step(self, clock: Clock) -> None:
        self.directions.copy_(to_device(self._drawn(clock.step), self.directions.device))

    def _drawn(self, step: int) -> Tensor:
        """Unit vectors (K, directions) of a step, equal on all ranks."""
        generator = torch.Generator().manual_seed(step)
        drawn = torch.randn(self.config.output_dim, self.config.directions, generator=generator)
        return torch.nn.functional.normalize(drawn, dim=0)

    def forward(self, views: list[Tensor], kin: Tensor | None = None) -> Tensor:
        batches = global_and_local(self.checked(views))
        pooled = torch.cat([self.backbone(images) for images in batches])
        embeddings = per_view(full(self.projector(pooled)), len(views[0]))  # (V, B, K)
        self.embedding = embeddings[0].detach()
        with torch.autocast(pooled.device.type, enabled=False):
            centre = embeddings[:GLOBAL].mean(dim=0)
            distance = (embeddings - centre).square().mean(dim=(0, 2))
            losses = (1 - self.config.weight) * distance + self.config.weight * self.sigreg(embeddings)
        return self.config.loss_scale * losses

    def sigreg(self, embeddings: Tensor) -> Tensor:
        """The regulariser of embeddings (V, B, K) of this rank, a number that is equal on all ranks."""
        everyone = ranks.gather_with_grad(embeddings.transpose(0, 1))  # (N, V, K)
        return epps_pulley(everyone @ self.directions).mean()

    def alignment(self, images: Tensor, other: Tensor) -> Tensor:
        # The distance alone has no gradient where two views are one, so the other images are negatives here.
        key, query = (normalise(self.projector(self.backbone(view))) for view in (other, images))
        return log_ratio(query, key.detach())
