"""Linear probe: how far a linear classifier gets on the features of the frozen encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from .. import config as cfg
from ..data import DataSets
from ..encoders.backbones import Backbone
from .recipes import PROBES, Settings
from .supervised import Result, labelled, train_classifier

__all__ = ["linear_probe", "probe_settings"]

_RECIPES = {"scfs": "dino"}  # of the methods whose recipe has another name
_SMALL = 96  # pixels of the largest views that ContrastiveCrop probes with its small-image recipe (STL-10)


def linear_probe(
    config: cfg.Config,
    encoder: Backbone,
    data: DataSets,
    device: torch.device,
    folder: str | Path,
    resume: bool = False,
) -> Result:
    """Train a linear classifier on `data.bank` and test it on `data.queries`, as `config.probe` says.

    The encoder comes back bit for bit as it was. See `train_classifier` for folder, resuming and errors.

    Raises:
        ValueError: also if the data have no labels.
    """
    images, tests = labelled(data.bank, "training"), labelled(data.queries, "test")
    return train_classifier(config, encoder, images, tests, probe_settings(config), device, folder, resume)


def probe_settings(config: cfg.Config) -> Settings:
    """The recipe that `config.probe` names or the method has, with the configuration's changes.

    Raises:
        ValueError: the method is one of which no probe is published, and `config.probe` names none.
    """
    probe = config.probe
    name: str = probe.recipe
    if name == "auto":
        small = config.views.size <= _SMALL
        name = "small" if small else _RECIPES.get(config.method.name, config.method.name)
    if name not in PROBES:
        raise ValueError(
            f"no linear probe is published for method.name {name}; "
            f"take that of another by probe.recipe={'|'.join(PROBES)}"
        )
    recipe = PROBES[name]
    return replace(
        recipe,
        epochs=probe.epochs or recipe.epochs,
        batch=probe.batch or recipe.batch,
        head_lr=probe.lr or recipe.head_lr,
        weight_decay=recipe.weight_decay if probe.weight_decay is None else probe.weight_decay,
        augment=probe.augment,
    )
