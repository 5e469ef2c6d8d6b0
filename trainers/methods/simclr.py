"""SimCLR: the two views of a sample find each other among all views of the batch (arXiv 2002.05709)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers import config as cfg
from trainers.encoders.backbones import Backbone
from trainers.engine import ranks
from trainers.methods.method import Method, are_kin, log_ratio
from trainers.methods.networks import normalise, projector

__all__ = ["SimCLR", "nt_xent"]


def nt_xent(first: Tensor, second: Tensor, temperature: float, kin: Tensor | None = None) -> Tensor:
    """NT-Xent per sample: mean of the losses of its two views, with all 2N - 1 others in the denominator.

        l(i) = -log( exp(cos(z_i, z_j) / T) / sum over k != i of exp(cos(z_i, z_k) / T) ),  j the other view

    N counts the samples of all ranks; gradients flow through the gathered embeddings.

    Args:
        first, second: embeddings (B, D) of the two views; B equal on all ranks.
        kin: (B, 2) number and partner of every sample, which are no negatives, see `are_kin`.

    Returns:
        Losses (B,) of this rank's samples; their mean over ranks is the loss of the joined batch.
    """
    with torch.autocast(first.device.type, enabled=False):
        own = torch.stack([normalise(first), normalise(second)], dim=1)  # (B, view, D)
        others = ranks.gather_with_grad(own).flatten(0, 1)  # sample i's views at 2i and 2i + 1
        logits = own.flatten(0, 1) @ others.T / temperature
        row = torch.arange(len(logits), device=logits.device)
        column = row + ranks.rank() * len(logits)
        itself = column[:, None] == torch.arange(len(others), device=logits.device)
        logits = logits.masked_fill(itself, -torch.inf)
        if kin is not None:
            related = are_kin(kin, ranks.gather(kin)).repeat_interleave(2, 0).repeat_interleave(2, 1)
            own_pair = column[:, None] // 2 == torch.arange(len(others), device=logits.device) // 2
            logits = logits.masked_fill(related & ~own_pair, -torch.inf)
        losses = F.cross_entropy(logits, column ^ 1, reduction="none")
        return losses.view(-1, 2).mean(dim=1)


class SimCLR(Method):
    """Backbone, projector and NT-Xent."""

    in_batch = "negatives"

    def __init__(self, backbone: Backbone, config: cfg.SimCLR) -> None:
        super().__init__()
        self.backbone = backbone
        widths = backbone.dim, config.hidden_dim, config.output_dim
        self.projector = projector(*widths, config.bn, output_bn=config.bn)
        self.temperature = config.temperature
        self.loss_scale = config.loss_scale

    def forward(self, views: list[Tensor], kin: Tensor | None = None) -> Tensor:
        # One pass over both views: batch norm sees them together.
        first, second = self.projector(self.backbone(torch.cat(self.checked(views)))).chunk(2)
        self.embedding = first.detach()
        return self.loss_scale * nt_xent(first, second, self.temperature, kin)

    def alignment(self, images: Tensor, other: Tensor) -> Tensor:
        key, query = (normalise(self.projector(self.backbone(view))) for view in (other, images))
        return log_ratio(query, key.detach())
