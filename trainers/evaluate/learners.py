"""What `supervised` trains: a linear head alone on a frozen encoder, or both together.

Both get their batches, and their tests, through the same decode and resize as pretraining.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from dali_views import SampleIndex, View, ViewLoader
from dali_views.plan import order

from .. import config as cfg
from ..data import evaluation_views, loader_options, plain_loader
from ..encoders.backbones import Backbone
from ..engine import ranks
from ..engine.schedules import lr_at
from ..engine.setting import Setting
from ..methods.split_bn import joined_batch_norm
from .knn import extract

__all__ = ["FineTuned", "Frozen", "Learner", "Recipe", "rate"]


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained."""

    epochs: int
    """Passes over the labelled images."""
    batch: int
    """Images per step over all processes."""
    head_lr: float
    """Peak rate of the classifier per 256 images: it is multiplied by batch / 256."""
    encoder_lr: float | None = None
    """The same for the encoder; None: the encoder is frozen."""
    weight_decay: float = 0.0
    """Decay rate of everything that learns, biases and norms included, as in all published recipes."""
    drops: tuple[float, ...] = ()
    """Shares of the epochs after each of which the rate is multiplied by `gamma`; none: half a cosine."""
    gamma: float = 0.1
    """Factor of each drop."""
    optimizer: Literal["sgd", "nesterov", "lars"] = "sgd"
    """SGD with plain or Nesterov's momentum, or LARS (trust 0.001; it adapts the bias as well)."""
    momentum: float = 0.9
    """Share of the last step's velocity that is kept."""
    augment: bool = True
    """Random crops and flips. False (frozen encoder only): features of the plain central view, found once."""


def rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Learning rate of one optimiser step, counted from 0, as a share of its peak.

    The cosine falls at every step (in the authors' code at every epoch), the drops come between epochs.
    """
    if not recipe.drops:
        return lr_at(step, recipe.epochs * steps_per_epoch, 0, 1.0)
    epoch = step // steps_per_epoch
    return recipe.gamma ** sum(epoch >= round(share * recipe.epochs) for share in recipe.drops)


@dataclass
class Learner(ABC):
    """A classifier in training, with its data.

    Args:
        head: on the device of `setting`, as the encoder.
        images: to learn from, all labelled; tests: to be tested on.
        recipe: its batch is divided by the ranks.
    """

    setting: Setting
    views: cfg.Views
    encoder: Backbone
    head: nn.Linear
    images: SampleIndex
    tests: SampleIndex
    recipe: Recipe

    def __post_init__(self) -> None:
        # All steps and ranks have equal batches; the rest is used only if there are fewer images than ranks.
        self.drop_last = len(self.images) >= self.recipe.batch
        self.module: nn.Module = self._module()
        """What learns: inputs as `batches` yields them -> logits (B, classes), float32."""

    @abstractmethod
    def _module(self) -> nn.Module:
        """Prepare the encoder; returns what learns."""

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return order.steps(len(self.images), self.recipe.batch, self.drop_last)

    @abstractmethod
    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's inputs and labels (B,) of an epoch."""

    @abstractmethod
    def score(self) -> tuple[float, float]:
        """top-1 and top-5 as shares of the test images, each counted once; equal on all ranks."""

    @cached_property
    def crops(self) -> ViewLoader:
        """Random crops and flips without colour: the training views of all published recipes."""
        view = View(size=self.views.size, crop="random", scale=(0.08, 1.0), flip=0.5)
        options = {**loader_options(self.setting, self.views), "drop_last": self.drop_last}
        return ViewLoader(self.images, [view], self.recipe.batch // ranks.world(), **options)

    def plain(self, index: SampleIndex) -> ViewLoader:
        """Every image of an index once, in the plain central view."""
        return plain_loader(self.setting, self.views, index, evaluation_views(self.views))


class Frozen(Learner):
    """Only the head learns; the encoder is in eval mode. Features of plain views are computed once."""

    def _module(self) -> nn.Module:
        self.encoder.eval()
        return self.head

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.recipe.augment:
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
        # In the loader's order and shares, so the steps are the same on any number of ranks.
        features, labels = self._training_features
        batch = self.recipe.batch
        for step in range(self.steps):
            mine = order.rank_slice(step * batch, len(labels), batch, ranks.rank(), ranks.world())
            found = order.rows(mine, len(labels), self.setting.seed, epoch)
            rows = torch.from_numpy(found).to(self.setting.device)
            yield features[rows], labels[rows]

    @cached_property
    def _training_features(self) -> tuple[Tensor, Tensor]:
        return extract(self._features, self.plain(self.images), self.setting.device)[:2]

    @cached_property
    def _test_features(self) -> tuple[Tensor, Tensor]:
        return extract(self._features, self.plain(self.tests), self.setting.device)[:2]

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        with self.setting.autocast():
            return self.encoder(images).float()


class FineTuned(Learner):
    """Encoder and head learn together; batch norm is computed over all GPUs."""

    def _module(self) -> nn.Module:
        if not self.recipe.augment:
            raise ValueError("features can be kept of a frozen encoder only; fine-tune with augment True")
        joined_batch_norm(self.encoder)
        self.encoder.to(self.setting.device)
        if ranks.world() > 1 and self.setting.device.type == "cuda":
            self.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(self.encoder)  # type: ignore[no-untyped-call]
        self.encoder.requires_grad_(True)  # a momentum encoder had it off
        return _Classifier(self.setting, self.encoder, self.head)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.crops.set_epoch(epoch)
        for batch in self.crops:
            yield batch.views[0], batch.label

    def score(self) -> tuple[float, float]:
        ranks.broadcast_buffers(self.module)
        self.module.eval()
        device = self.setting.device
        best, labels, _ = extract(lambda images: _best(self.module(images)), self._plain_tests, device)
        return _accuracy(best, labels)

    @cached_property
    def _plain_tests(self) -> ViewLoader:
        return self.plain(self.tests)


class _Classifier(nn.Module):
    def __init__(self, setting: Setting, encoder: Backbone, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head, self.setting = encoder, head, setting

    def forward(self, images: Tensor) -> Tensor:
        with self.setting.autocast():
            features = self.encoder(images)
        logits: Tensor = self.head(features.float())
        return logits


def _best(logits: Tensor) -> Tensor:
    """The five likeliest classes of each row, or all if there are fewer."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def _accuracy(best: Tensor, labels: Tensor) -> tuple[float, float]:
    right = best == labels[:, None]
    return float(right[:, 0].double().mean()), float(right.any(1).double().mean())
