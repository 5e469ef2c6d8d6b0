"""Semi-supervised evaluation: encoder and classifier fine-tuned together on a few labelled images."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dali_views import SampleIndex
from dali_views.data.names import unpack_names

from .. import config as cfg
from ..data import DataSets
from ..encoders.backbones import Backbone
from .recipes import FEW_LABELS, MORE_LABELS, Settings
from .supervised import Result, labelled, train_classifier

__all__ = ["finetune", "finetune_settings", "labelled_list", "labelled_share"]

_FEW = 0.05


def finetune(
    config: cfg.Config,
    encoder: Backbone,
    data: DataSets,
    device: torch.device,
    folder: str | Path,
    resume: bool = False,
) -> Result:
    """Fine-tune on the images of `data.bank` that keep their label; test on `data.queries`.

    `config.finetune` says which and how. The encoder is changed in place, in train mode. See
    `train_classifier` for folder, resuming and errors.

    Raises:
        ValueError: also if the data have no labels, or not the images that are listed.
        FileNotFoundError: there is no such list.
    """
    images, tests = labelled(data.bank, "training"), labelled(data.queries, "test")
    labels = config.finetune.labels
    if isinstance(labels, str):
        rows = labelled_list(images, labels)
        share = len(rows) / len(images)
    else:
        rows, share = labelled_share(images, labels, config.run.seed), labels
    settings = finetune_settings(config.finetune, share)
    return train_classifier(config, encoder, images.subset(rows), tests, settings, device, folder, resume)


def finetune_settings(config: cfg.FineTune, share: float) -> Settings:
    """The recipe for a share of the labels, with the configuration's changes."""
    recipe = FEW_LABELS if share <= _FEW else MORE_LABELS
    return replace(
        recipe,
        epochs=config.epochs or recipe.epochs,
        batch=config.batch or recipe.batch,
        encoder_lr=config.lr or recipe.encoder_lr,
        head_lr=config.head_lr or recipe.head_lr,
        weight_decay=recipe.weight_decay if config.weight_decay is None else config.weight_decay,
    )


def labelled_share(index: SampleIndex, share: float, seed: int) -> NDArray[np.int64]:
    """Rows that keep their label: the same share of every class, rounded, but at least one image.

    A pure function of the labels and the seed. Every class has its own draw, so that the images of one do
    not hang on which others there are; a larger share includes a smaller one.

    Args:
        share: in (0, 1].

    Returns:
        sorted rows.

    Raises:
        ValueError: the share is none.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the share of labels should be in (0, 1], not {share}")
    kept = []
    for label in np.unique(index.labels[index.labels >= 0]).tolist():
        rows = np.flatnonzero(index.labels == label)
        shuffled = np.random.default_rng([seed, label]).permutation(rows)
        kept.append(shuffled[: max(1, round(share * len(rows)))])
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.int64)


def labelled_list(index: SampleIndex, file: str | Path) -> NDArray[np.int64]:
    """Rows of the images that a text file names, one a line, as SimCLR's 1percent.txt does for ImageNet.

    A line with a slash is a path relative to the index's root, one without is a file name.

    Returns:
        sorted rows, each once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names nothing, an image that the index lacks, or a file name that occurs twice.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(f"there is no list of labelled images {file}; check finetune.labels")
    if index.paths is None:
        raise ValueError(f"{file} names files, but these images are in memory; give finetune.labels a share")
    lines = Path(file).read_bytes().splitlines()
    wanted = {line.strip() for line in lines if line.strip()}
    if not wanted:
        raise ValueError(f"{file} names no image; write one name a line")
    found: dict[bytes, list[int]] = {name: [] for name in sorted(wanted)}
    for row, path in enumerate(unpack_names(index.paths)):
        for name in {path, path.rpartition(b"/")[2]} & wanted:
            found[name].append(row)
    for problem, names in (
        ("are not among the labelled images", [name for name, rows in found.items() if not rows]),
        (
            "occur in several folders; write folder/name",
            [name for name, rows in found.items() if len(rows) > 1],
        ),
    ):
        if names:
            first = os.fsdecode(names[0])
            raise ValueError(f"{len(names)} of {len(wanted)} names in {file} {problem}, the first is {first}")
    return np.sort(np.unique([rows[0] for rows in found.values()])).astype(np.int64)
