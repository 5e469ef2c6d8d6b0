"""Evaluations that train: a linear probe on frozen features, fine-tuning on few labels."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from .section import Count, NotNegative, Positive, Section


class Probe(Section):
    """A linear classifier on the frozen encoder. What is absent is taken from the recipe."""

    recipe: Literal["auto", "moco", "simclr", "byol", "simsiam", "dino", "small"] = "auto"
    """Whose published recipe is followed; auto: that of the method, `small` for views up to 96 pixels."""
    epochs: Count | None = None
    """Passes over the labelled images."""
    batch: Count | None = None
    """Images per step over all processes."""
    lr: Positive | None = None
    """Peak learning rate per 256 images: it is multiplied by batch / 256."""
    weight_decay: NotNegative | None = None
    """Decay rate of the classifier's weights."""
    augment: bool = True
    """Random crops and flips, as published. False: features of the plain central view are computed once
    and kept, which is quick and costs accuracy."""


class FineTune(Section):
    """Encoder and classifier trained together on a share of the labels; absent: as published."""

    labels: float | str = 0.01
    """Share of every class's images that keep their label, or a text file of image names, one a line."""
    epochs: Count | None = None
    """Passes over the labelled images."""
    batch: Count | None = None
    """Images per step over all processes."""
    lr: Positive | None = None
    """Peak learning rate of the encoder per 256 images: it is multiplied by batch / 256."""
    head_lr: Positive | None = None
    """The same for the classifier."""
    weight_decay: NotNegative | None = None
    """Decay rate of the weights."""

    @model_validator(mode="after")
    def _labels_are_a_share_or_a_file(self) -> FineTune:
        if not isinstance(self.labels, str) and not 0 < self.labels <= 1:
            raise ValueError(f"finetune.labels should be a share in (0, 1] or a file, not {self.labels}")
        return self
