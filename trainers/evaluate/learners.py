"""What `supervised` trains: a linear head on an encoder, frozen or not, and by which recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from dali_views import SampleIndex, View, ViewLoader
from dali_views.plan import order
from dali_views.system.ranks import to_device

from .. import config as cfg
from ..data import evaluation_views, loader_options, plain_loader
from ..encoders.backbones import Backbone
from ..engine import ranks
from ..engine.optim import lr_at
from ..engine.setting import Setting
from ..methods.networks import joined_batch_norm, synced_batch_norm
from .box_scores import spread_rows
from .knn import extract
from .logistic import standard

__all__ = ["Learner", "Recipe", "rate"]


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained."""

    epochs: int  # passes over the labelled images
    batch: int  # images per step over all processes
    head_lr: float  # peak rate of the classifier per 256 images: it is multiplied by batch / 256
    encoder_lr: float | None = None  # the same for the encoder; None: the encoder is frozen
    weight_decay: float = 0.0  # of everything that learns, biases and norms included, as published
    drops: tuple[float, ...] = ()
    """Shares of the epochs after each of which the rate is multiplied by `gamma`; none: half a cosine."""
    gamma: float = 0.1
    optimizer: Literal["sgd", "nesterov", "lars"] = "sgd"
    """SGD with plain or Nesterov's momentum, or LARS (trust 0.001; it adapts the bias as well)."""
    momentum: float = 0.9
    augment: bool = True
    """Random crops and flips. False (frozen encoder only): features of the plain central view, found once."""
    standardised: bool = False
    """Features are shifted and scaled, see `standard`; frozen encoder only."""


def rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Learning rate of one optimiser step, counted from 0, as a share of its peak.

    The cosine falls at every step (in the authors' code at every epoch), the drops come between epochs.
    """
    if not recipe.drops:
        return lr_at(step, recipe.epochs * steps_per_epoch, 0, 1.0)
    epoch = step // steps_per_epoch
    return recipe.gamma ** sum(epoch >= round(share * recipe.epochs) for share in recipe.drops)


@dataclass
class Learner:
    """A classifier in training, with its data: the head alone if the recipe freezes the encoder, else both.

    A frozen encoder is in eval mode, and its features of plain views are computed once. Otherwise batch norm
    is computed over all GPUs. Head and encoder are on the device of `setting`, and all `images` are labelled.
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
        self.frozen = self.recipe.encoder_lr is None
        self._standard: tuple[Tensor, Tensor] | None = None
        self.module: nn.Module = self.head
        """What learns: inputs as `batches` yields them -> logits (B, classes), float32."""
        if self.frozen:
            self.encoder.eval()
            if self.recipe.standardised:
                self._standard = standard(self._some_features())
            return
        joined_batch_norm(self.encoder)
        self.encoder.to(self.setting.device)
        if ranks.world() > 1 and self.setting.device.type == "cuda":
            self.encoder = synced_batch_norm(self.encoder)
        self.encoder.requires_grad_(True)  # a momentum encoder had it off
        self.module = _Classifier(self.setting, self.encoder, self.head)

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return order.steps(len(self.images), self.recipe.batch, self.drop_last)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's inputs and labels (B,) of an epoch: random crops and flips without colour, the training
        views of all published recipes, or features that are kept."""
        if self.frozen and not self.recipe.augment:
            yield from self._kept_batches(epoch)
            return
        self.crops.set_epoch(epoch)
        for batch in self.crops:
            yield self._features(batch.views[0]) if self.frozen else batch.views[0], batch.label

    def _kept_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        # In the loader's order and shares, so the steps are the same on any number of ranks.
        features, labels = self._training_features
        batch = self.recipe.batch
        for step in range(self.steps):
            mine = order.rank_slice(step * batch, len(labels), batch, ranks.rank(), ranks.world())
            found = order.rows(mine, len(labels), self.setting.seed, epoch)
            rows = to_device(torch.from_numpy(found), self.setting.device)
            yield features[rows].float(), labels[rows]

    def score(self) -> tuple[float, float]:
        """top-1 and top-5 as shares of the test images, each counted once; equal on all ranks."""
        ranks.broadcast_buffers(self.module)
        self.module.eval()
        if self.frozen:
            features, labels = self._test_features
            with torch.no_grad():
                best = _best(self.head(features))
        else:
            device = self.setting.device
            best, labels, _ = extract(lambda images: _best(self.module(images)), self._plain_tests, device)
        right = best == labels[:, None]
        return float(right[:, 0].double().mean()), float(right.any(1).double().mean())

    @cached_property
    def crops(self) -> ViewLoader:
        """The loader of random crops."""
        view = View(size=self.views.size, crop="random", scale=(0.08, 1.0), flip=0.5)
        options = {**loader_options(self.setting, self.views), "drop_last": self.drop_last}
        return ViewLoader(self.images, [view], self.recipe.batch // ranks.world(), **options)

    @cached_property
    def _plain_tests(self) -> ViewLoader:
        return plain_loader(self.setting, self.views, self.tests, evaluation_views(self.views))

    def _some_features(self) -> Tensor:
        """Features (at most 5,000, D) of plain views of images that are evenly spread."""
        some = self.images.subset(spread_rows(len(self.images)))
        plain = plain_loader(self.setting, self.views, some, evaluation_views(self.views))
        return extract(self._features, plain, self.setting.device)[0]

    @cached_property
    def _training_features(self) -> tuple[Tensor, Tensor]:
        plain = plain_loader(self.setting, self.views, self.images, evaluation_views(self.views))
        # Where nothing can overflow, in half the memory: 5.2 GB for ImageNet at D = 2048.
        dtype = torch.float32 if self._standard is None else torch.float16
        return extract(self._features, plain, self.setting.device, dtype=dtype)[:2]

    @cached_property
    def _test_features(self) -> tuple[Tensor, Tensor]:
        return extract(self._features, self._plain_tests, self.setting.device)[:2]

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        with self.setting.autocast():
            features: Tensor = self.encoder(images)
        if self._standard is None:
            return features.float()
        mean, scale = self._standard
        return (features.float() - mean) * scale


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
