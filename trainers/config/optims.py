"""Optimisers and their schedules."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import Count, NotNegative, Positive, Section, ShareBelowOne


class _OptimBase(Section):
    batch: Count = 256
    """Images per step over all processes."""
    lr_scaling: bool = True
    """Multiply `lr` and `min_lr` by batch / 256."""
    warmup_epochs: NotNegative = 0.0
    """Epochs of linear growth of the learning rate from 0 to its peak."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of the cosine, in the unit of `lr`."""
    decay_norms: bool = False
    """Decay also biases and 1-D weights, as the code of MoCo, SimSiam and ContrastiveCrop does."""
    clip: Positive | None = None
    """Greatest length of each parameter's gradient, longer ones are shortened to it (DINO: 3)."""
    final_weight_decay: NotNegative | None = None
    """Weight decay at the end, reached by half a cosine (DINO for ViTs: 0.4); absent: constant."""
    lr: Positive
    """Peak learning rate, per 256 images if `lr_scaling`."""
    weight_decay: NotNegative
    """Decay rate of the weights."""

    @property
    def peak_lr(self) -> float:
        """Learning rate at the top of the schedule, after scaling."""
        return self.lr * self.batch / 256 if self.lr_scaling else self.lr

    @property
    def floor_lr(self) -> float:
        """Learning rate at the end of the schedule, after scaling."""
        return self.min_lr * self.batch / 256 if self.lr_scaling else self.min_lr


class SGD(_OptimBase):
    """Stochastic gradient descent with momentum; the defaults are MoCo v2's."""

    name: Literal["sgd"] = "sgd"
    lr: Positive = 0.03
    """Peak learning rate, per 256 images if `lr_scaling`."""
    weight_decay: NotNegative = 1e-4
    """Added to the gradient, times the weight."""
    momentum: ShareBelowOne = 0.9
    """Share of the last step's velocity that is kept."""


class LARS(_OptimBase):
    """Layer-wise adaptive rates, arXiv 1708.03888; the defaults are SimCLR's."""

    name: Literal["lars"] = "lars"
    lr: Positive = 0.3
    """Peak learning rate, per 256 images if `lr_scaling`."""
    weight_decay: NotNegative = 1e-6
    """Added to the gradient, times the weight."""
    momentum: ShareBelowOne = 0.9
    """Share of the last step's velocity that is kept."""
    trust: Positive = 0.001
    """Trust coefficient eta: length of a layer's step relative to the length of its weights, times lr."""


class AdamW(_OptimBase):
    """Adam with decoupled weight decay; the defaults are DINO's for ViTs."""

    name: Literal["adamw"] = "adamw"
    lr: Positive = 5e-4
    """Peak learning rate, per 256 images if `lr_scaling`."""
    weight_decay: NotNegative = 0.04
    """Share of the weight removed per step, times the learning rate."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    """Decay rates of the running first and second moments."""


Optim = Annotated[SGD | LARS | AdamW, Field(discriminator="name")]
