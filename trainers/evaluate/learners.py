"""What `supervised` trains: a linear head alone on a frozen encoder, or both together.

Both bring their batches, and test themselves, through the same decode and resize as pretraining.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from dali_views import SampleIndex, View, ViewLoader
from dali_views.plan import order

from .. import config as cfg
from ..data import evaluation_views, loader_options, plain_loader
from ..encoders.backbones import Backbone
from ..engine import ranks as distributed
from ..engine.amp import autocast
from ..methods.split_bn import joined_batch_norm
from .knn import extract
from .recipes import Settings

__all__ = ["FineTuned", "Frozen", "Learner"]


class Learner(ABC):
    """A classifier in training, with its data.

    Args:
        config: of the run, for views and devices.
        head: on `device`, as the encoder.
        images: to learn from, all labelled; tests: to be tested on.
        settings: their batch is divided by the ranks.
    """

    def __init__(
        self,
        config: cfg.Config,
        encoder: Backbone,
        head: nn.Linear,
        images: SampleIndex,
        tests: SampleIndex,
        settings: Settings,
        device: torch.device,
    ) -> None:
        self.config, self.encoder, self.head, self.device = config, encoder, head, device
        self.images, self.tests, self.settings = images, tests, settings
        # Dropping the rest keeps all steps and all ranks alike; only fewer images than ranks are kept.
        self.drop_last = len(images) >= settings.batch
        self.module: nn.Module = self._module()
        """What learns: inputs as `batches` yields them -> logits (B, classes), float32."""

    @abstractmethod
    def _module(self) -> nn.Module:
        """Set the encoder up; what learns."""

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return order.steps(len(self.images), self.settings.batch, self.drop_last)

    @abstractmethod
    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's inputs and labels (B,) of an epoch."""

    @abstractmethod
    def score(self) -> tuple[float, float]:
        """top-1 and top-5 as shares of the test images, each counted once; equal on all ranks."""

    @cached_property
    def crops(self) -> ViewLoader:
        """Random crops and flips without colour: what all published recipes train on."""
        view = View(size=self.config.views.size, crop="random", scale=(0.08, 1.0), flip=0.5)
        options = {**loader_options(self.config), "drop_last": self.drop_last}
        return ViewLoader(self.images, [view], self.settings.batch // distributed.world(), **options)

    def plain(self, index: SampleIndex) -> ViewLoader:
        """Every image of an index once, in the plain central view."""
        return plain_loader(self.config, index, evaluation_views(self.config.views))


class Frozen(Learner):
    """Only the head learns; the encoder is in eval mode. What it makes of plain views is found once."""

    def _module(self) -> nn.Module:
        self.encoder.eval()
        return self.head

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.settings.augment:
            yield from self._kept_batches(epoch)
            return
        self.crops.set_epoch(epoch)
        for batch in self.crops:
            yield self._features(batch.views[0]), batch.label

    def score(self) -> tuple[float, float]:
        features, labels = self._test_features
        with torch.no_grad():
            return _accuracy(_best(self.head(features)), labels)

    def _kept_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        # In the loader's order and shares, hence the same steps on any number of ranks.
        features, labels = self._training_features
        rank, world = distributed.rank(), distributed.world()
        batch = self.settings.batch
        for step in range(self.steps):
            mine = order.rank_slice(step * batch, len(labels), batch, rank, world)
            found = order.rows(mine, len(labels), self.config.run.seed, epoch)
            rows = torch.from_numpy(found).to(self.device)
            yield features[rows], labels[rows]

    @cached_property
    def _training_features(self) -> tuple[Tensor, Tensor]:
        return extract(self._features, self.plain(self.images), self.device)[:2]

    @cached_property
    def _test_features(self) -> tuple[Tensor, Tensor]:
        return extract(self._features, self.plain(self.tests), self.device)[:2]

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        with autocast(self.config, self.device):
            return self.encoder(images).float()


class FineTuned(Learner):
    """Encoder and head learn together; batch norm is computed over all GPUs."""

    def _module(self) -> nn.Module:
        if not self.settings.augment:
            raise ValueError("features can be kept of a frozen encoder only; fine-tune with augment True")
        joined_batch_norm(self.encoder)
        self.encoder.to(self.device)
        if distributed.world() > 1 and self.device.type == "cuda":
            self.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(self.encoder)  # type: ignore[no-untyped-call]
        self.encoder.requires_grad_(True)  # a momentum encoder had it off
        return _Classifier(self.config, self.encoder, self.head, self.device)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.crops.set_epoch(epoch)
        for batch in self.crops:
            yield batch.views[0], batch.label

    def score(self) -> tuple[float, float]:
        distributed.broadcast_buffers(self.module)
        self.module.eval()
        best, labels, _ = extract(lambda images: _best(self.module(images)), self._plain_tests, self.device)
        return _accuracy(best, labels)

    @cached_property
    def _plain_tests(self) -> ViewLoader:
        return self.plain(self.tests)


class _Classifier(nn.Module):
    def __init__(self, config: cfg.Config, encoder: Backbone, head: nn.Linear, device: torch.device) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.config, self.device = config, device

    def forward(self, images: Tensor) -> Tensor:
        with autocast(self.config, self.device):
            features = self.encoder(images)
        logits: Tensor = self.head(features.float())
        return logits


def _best(logits: Tensor) -> Tensor:
    """The five likeliest classes of each row, or all of fewer."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def _accuracy(best: Tensor, labels: Tensor) -> tuple[float, float]:
    right = best == labels[:, None]
    return float(right[:, 0].double().mean()), float(right.any(1).double().mean())
