"""MoCo v2: a query finds its key among a queue of earlier keys (arXiv 1911.05722, 2003.04297)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dali_views.system.ranks import to_device
from trainers import config as cfg
from trainers.encoders.backbones import Backbone
from trainers.engine import ranks
from trainers.engine.optim import Clock
from trainers.methods.method import Method, are_kin, log_ratio
from trainers.methods.networks import ema_update, momentum_copy, normalise, projector, split_batch_norm

__all__ = ["MoCo", "info_nce"]


def info_nce(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float, excluded: Tensor | None = None
) -> Tensor:
    """InfoNCE per sample (B,): -log( exp(q.k / T) / (exp(q.k / T) + sum over the queue of exp(q.n / T)) ).

    Args:
        query, key: rows of length 1 (B, D); gradients flow through the query.
        queue: negatives of length 1 (K, D).
        excluded: bool (B, K), entries of the queue that are no negatives of a query.
    """
    with torch.autocast(query.device.type, enabled=False):
        positive = (query * key).sum(dim=1, keepdim=True)
        negative = query @ queue.T
        if excluded is not None:
            negative = negative.masked_fill(excluded, -torch.inf)
        logits = torch.cat([positive, negative], dim=1) / temperature
        answer = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return F.cross_entropy(logits, answer, reduction="none")


class MoCo(Method):
    """Query and key encoder, queue, and InfoNCE.

    Keys are encoded in shuffled order (over all ranks, or over the groups of split batch norm), so that the
    statistics of batch norm do not reveal the positive. The shuffle is a pure function of the step. With
    `symmetric`, the two directions are added, as in the authors' CIFAR demo.
    """

    sync_bn = False  # shuffling works because each process has its own statistics
    queue: Tensor
    queue_kin: Tensor
    pointer: Tensor

    def __init__(self, backbone: Backbone, config: cfg.MoCo) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector(backbone.dim, config.hidden_dim, config.output_dim, config.bn)
        if config.split_bn:
            split_batch_norm(self.backbone, config.split_bn)
        self.key_backbone = momentum_copy(self.backbone)
        self.key_projector = momentum_copy(self.projector)
        self.temperature = config.temperature
        self.loss_scale = config.loss_scale
        self.momentum = config.momentum
        self.symmetric = config.symmetric
        self.split_bn = config.split_bn
        self.register_buffer("queue", normalise(torch.randn(config.queue, config.output_dim)))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.step = 0
        # Number and partner of the sample of each key, -1 where unknown.
        self.register_buffer("queue_kin", torch.full((config.queue, 2), -1))
        self._fresh: tuple[Tensor, Tensor] | None = None  # keys of the calls of this step, and their kin

    def before_step(self, clock: Clock) -> None:
        self.step = clock.step  # seeds the shuffles

    def forward(self, views: list[Tensor], kin: Tensor | None = None) -> Tensor:
        first, second = self.checked(views)
        losses = self._direction(first, second, 0, kin)
        if self.symmetric:
            losses = losses + self._direction(second, first, 1, kin)
        return self.loss_scale * losses

    def alignment(self, images: Tensor, other: Tensor) -> Tensor:
        with torch.no_grad():
            key = normalise(self.key_projector(self.key_backbone(other)))
        return log_ratio(normalise(self.projector(self.backbone(images))), key)

    def after_step(self, clock: Clock) -> None:
        """Move the key encoder and enqueue all calls' keys (not sooner: backward needs the old queue)."""
        ema_update(self.key_backbone, self.backbone, self.momentum)
        ema_update(self.key_projector, self.projector, self.momentum)
        if self._fresh is not None:
            self.enqueue(*self._fresh)
            self._fresh = None

    @property
    def momentum_encoder(self) -> Backbone:
        return self.key_backbone

    @torch.no_grad()
    def enqueue(self, keys: Tensor, kin: Tensor | None = None) -> None:
        """Overwrite the oldest entries by `keys` (n, D) of all ranks, with their `kin` (n, 2); any n."""
        size, kept = len(self.queue), keys[-len(self.queue) :]
        start = self.pointer + len(keys) - len(kept)
        # Computed on the device: to read the pointer, the CPU would wait for the GPU.
        place = (start + torch.arange(len(kept), device=keys.device)) % size
        self.queue[place] = kept
        self.queue_kin[place] = -1 if kin is None else kin[-size:]
        self.pointer.copy_((self.pointer + len(keys)) % size)

    def _direction(self, query_view: Tensor, key_view: Tensor, direction: int, kin: Tensor | None) -> Tensor:
        query = normalise(self.projector(self.backbone(query_view)))
        if direction == 0:
            self.embedding = query.detach()
        keys = self._keys(key_view, 2 * self.step + direction)
        if self.training:
            unknown = torch.full((len(keys), 2), -1, device=keys.device)
            fresh = keys, unknown if kin is None else ranks.gather(kin)
            if self._fresh is not None:  # joined at once: every length of a list would be compiled anew
                fresh = torch.cat([self._fresh[0], fresh[0]]), torch.cat([self._fresh[1], fresh[1]])
            self._fresh = fresh
        start = ranks.rank() * len(query)
        excluded = None if kin is None else are_kin(kin, self.queue_kin)
        return info_nce(query, keys[start : start + len(query)], self.queue, self.temperature, excluded)

    @torch.no_grad()
    def _keys(self, images: Tensor, seed: int) -> Tensor:
        """Keys of all ranks in rank order (world * B, D), each encoded in a batch mixed over the ranks."""
        if ranks.world() == 1 and not self.split_bn:
            return normalise(self.key_projector(self.key_backbone(images)))
        # As (B, S, S, 3), which is how channels_last images lie in memory: nothing is copied to gather them.
        everything = ranks.gather(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        start, rows = ranks.rank() * len(images), len(images)
        # Equal on all ranks without communication, and again after a resume.
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
        both = to_device(torch.cat([order[start : start + rows], torch.argsort(order)]), images.device)
        mine, back = torch.split(both, [rows, len(order)])
        keys = ranks.gather(normalise(self.key_projector(self.key_backbone(everything[mine]))))
        return keys[back]
