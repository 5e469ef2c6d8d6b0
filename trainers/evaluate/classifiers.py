"""Linear probe and fine-tuning: published recipes, and which images keep their label.

Rates are per 256 images here, so that a recipe stays sensible when the batch is changed or does not fit.
All have momentum 0.9, random crops of 8 to 100 % of the image and flips in training, the central 224 of 256
pixels in testing (small images whole), and, except ORL's with few labels, no weight decay.

Linear probes, `PROBES`:

- auto: features of plain central views, made once and standardised (`learners.standard`), rate 5, batch 256,
  100 epochs, Nesterov, cosine; ours, the default. The published rates fit encoders that were trained as
  published: on others they diverge or hardly move. For three encoders, trained and not, with 80 and 1,000
  images of each class of CIFAR-10, rate 5 was within 1.1 points of the best of 1, 3, 5, 10 and 30.
- moco: rate 30, batch 256, 100 epochs, a tenth after 60 and 80 (arXiv 1911.05722, section 4.1, and code).
- small: rate 10 at batch 512 (5 per 256), else as moco; ContrastiveCrop's code (arXiv 2202.03278) has it
  for CIFAR, STL-10 and Tiny-ImageNet, whatever the method.
- simclr: rate 0.1, batch 4096, 90 epochs, Nesterov, cosine (arXiv 2002.05709, appendix B.6, and the
  authors' issue 5). Their ImageNet command has weight decay 1e-6, the paper none; we use none.
- byol: batch 1024, 80 epochs, Nesterov, cosine (arXiv 2006.07733, appendix C.1). The paper takes the best
  rate of 0.4, 0.3, 0.2, 0.1 and 0.05 on held-out images; 0.2 and its scaling per 256 images are our choice.
- simsiam: LARS, rate 0.1, batch 4096, 90 epochs, cosine; the authors' PyTorch code. Their paper
  (arXiv 2011.10566, appendix A) has rate 0.02, on TPUs.
- dino: rate 0.01, batch 2048, 100 epochs, cosine; SCFS's command for ResNet-50 (arXiv 2212.06486).
  DINO (arXiv 2104.14294) picks a rate per model: its code's default, for ViTs, is 0.001 at batch 1024, and
  its log of ResNet-50 shows 0.3 after scaling, at a batch that is not told.

Fine-tuning, `FEW_LABELS` up to 5 % of the labels and `MORE_LABELS` above; the border is our choice.

- simclr: rate 0.05, batch 4096, Nesterov; 60 epochs at 1 % of the labels, 30 at 10 % (arXiv 2002.05709,
  appendix B.5). How the rate falls is not told; ours is a cosine.
- byol: batch 1024, Nesterov (arXiv 2006.07733, appendix C.2). The paper takes the best of 30 and 50 epochs
  and of the rates 0.1, 0.05, 0.02, 0.01 and 0.005 on held-out images; 50 epochs at 1 %, 30 at 10 %, rate
  0.02 (0.005 per 256 images) and the cosine are our choice.
- other, for all other methods: 20 epochs, batch 256, a fifth after 12 and 16. At 1 %: rate 0.01, the
  classifier's 100 times that, weight decay 5e-4; ORL (arXiv 2106.11952). At 10 %: rate 0.01, the classifier's
  0.2; SwAV (arXiv 2006.09882), from which ORL's released setting differs in the classifier's rate only, 1.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_views import SampleIndex
from dali_views.system.files import unpack_names

from .. import config as cfg
from ..data import DataSets
from ..encoders.backbones import Backbone
from ..engine.setting import Setting
from .learners import Recipe
from .supervised import Result, labelled, train_classifier

__all__ = [
    "FEW_LABELS", "MORE_LABELS", "PROBES", "finetune", "finetune_recipe", "labelled_list", "labelled_share",
    "linear_probe", "probe_recipe",
]  # fmt: skip

_FEW = 0.05
_RECIPES = {"scfs": "dino", "lejepa": "dino"}  # methods whose recipe has another name
_SMALL = 96  # pixels of the largest views that ContrastiveCrop probes with its small-image recipe (STL-10)

_MOCO = Recipe(epochs=100, batch=256, head_lr=30.0, drops=(0.6, 0.8))
_SIMCLR = Recipe(epochs=90, batch=4096, head_lr=0.1, optimizer="nesterov")

PROBES: dict[str, Recipe] = {
    "auto": Recipe(
        epochs=100, batch=256, head_lr=5.0, optimizer="nesterov", augment=False, standardised=True
    ),
    "moco": _MOCO,
    "small": replace(_MOCO, batch=512, head_lr=5.0),
    "simclr": _SIMCLR,
    "byol": replace(_SIMCLR, epochs=80, batch=1024, head_lr=0.2),
    "simsiam": replace(_SIMCLR, optimizer="lars"),
    "dino": Recipe(epochs=100, batch=2048, head_lr=0.01),
}

MORE_LABELS: dict[str, Recipe] = {
    "simclr": replace(_SIMCLR, epochs=30, head_lr=0.05, encoder_lr=0.05),
    "byol": replace(_SIMCLR, epochs=30, batch=1024, head_lr=0.005, encoder_lr=0.005),
    "other": Recipe(epochs=20, batch=256, head_lr=0.2, encoder_lr=0.01, drops=(0.6, 0.8), gamma=0.2),
}
FEW_LABELS: dict[str, Recipe] = {
    "simclr": replace(MORE_LABELS["simclr"], epochs=60),
    "byol": replace(MORE_LABELS["byol"], epochs=50),
    "other": replace(MORE_LABELS["other"], head_lr=1.0, weight_decay=5e-4),
}


def linear_probe(
    config: cfg.Config, setting: Setting, encoder: Backbone, data: DataSets, folder: Path,
    resume: bool = False,
) -> Result:  # fmt: skip
    """Train a linear classifier on `data.bank` and test it on `data.queries`, as `config.probe` says.

    The encoder is bit for bit the same afterwards. See `train_classifier` for folder, resuming and errors.
    """
    recipe = probe_recipe(config)
    return train_classifier(setting, config.views, encoder, data.bank, data.queries, recipe, folder, resume)


def finetune(
    config: cfg.Config, setting: Setting, encoder: Backbone, data: DataSets, folder: Path,
    resume: bool = False,
) -> Result:  # fmt: skip
    """Fine-tune on the images of `data.bank` that keep their label; test on `data.queries`.

    `config.finetune` says which and how. The encoder is changed in place. See `train_classifier` for folder,
    resuming and errors; an image list raises as `labelled_list`.
    """
    images, labels = labelled(data.bank, "training"), config.finetune.labels
    if isinstance(labels, str):
        rows = labelled_list(images, labels)
        share = len(rows) / len(images)
    else:
        rows, share = labelled_share(images, labels, setting.seed), labels
    recipe, chosen = finetune_recipe(config, share), images.subset(rows)
    return train_classifier(setting, config.views, encoder, chosen, data.queries, recipe, folder, resume)


def probe_recipe(config: cfg.Config) -> Recipe:
    """The recipe that `config.probe` names or the method has, with the configuration's changes."""
    probe = config.probe
    name: str = probe.recipe
    if name == "published":
        small = config.views.size <= _SMALL
        name = "small" if small else _RECIPES.get(config.method.name, config.method.name)
    if name not in PROBES:
        raise ValueError(
            f"no linear probe is published for method.name {name}; "
            f"take that of another by probe.recipe={'|'.join(PROBES)}"
        )
    return _changed(
        PROBES[name], epochs=probe.epochs, batch=probe.batch, head_lr=probe.lr, augment=probe.augment,
        weight_decay=probe.weight_decay,
    )  # fmt: skip


def finetune_recipe(config: cfg.Config, share: float) -> Recipe:
    """The recipe of `config.finetune` or the method for a share of the labels, with changes."""
    how, recipes = config.finetune, FEW_LABELS if share <= _FEW else MORE_LABELS
    name = config.method.name if how.recipe == "auto" else how.recipe
    return _changed(
        recipes.get(name, recipes["other"]), epochs=how.epochs, batch=how.batch, encoder_lr=how.lr,
        head_lr=how.head_lr, weight_decay=how.weight_decay,
    )  # fmt: skip


def _changed(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, **{key: value for key, value in changes.items() if value is not None})


def labelled_share(index: SampleIndex, share: float, seed: int) -> NDArray[np.int64]:
    """Sorted rows that keep their label: the same share of every class, rounded, but at least one image.

    A pure function of labels and seed. Every class has its own draw, so that its images do not depend on the
    other classes; a larger share includes a smaller one.
    """
    kept = []
    for label in np.unique(index.labels[index.labels >= 0]).tolist():
        rows = np.flatnonzero(index.labels == label)
        shuffled = np.random.default_rng([seed, label]).permutation(rows)
        kept.append(shuffled[: max(1, round(share * len(rows)))])
    return np.sort(np.concatenate(kept)) if kept else np.zeros(0, np.int64)


def labelled_list(index: SampleIndex, file: str | Path) -> NDArray[np.int64]:
    """Sorted rows of the images that a text file names, one a line, as SimCLR's 1percent.txt for ImageNet.

    A line with a slash is a path relative to the index's root, other lines are file names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names nothing, an image that the index lacks, or a file name that occurs twice.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(f"there is no list of labelled images {file}; check finetune.labels")
    if index.paths is None:
        raise ValueError(
            f"{file} names files, but these images are in memory; set finetune.labels to a share"
        )
    lines = Path(file).read_bytes().splitlines()
    wanted = {line.strip() for line in lines if line.strip()}
    if not wanted:
        raise ValueError(f"{file} names no image; write one name a line")
    found: dict[bytes, list[int]] = {name: [] for name in sorted(wanted)}
    for row, path in enumerate(unpack_names(index.paths)):
        for name in {path, path.rpartition(b"/")[2]} & wanted:
            found[name].append(row)
    absent = [name for name, rows in found.items() if not rows]
    twice = [name for name, rows in found.items() if len(rows) > 1]
    if names := absent or twice:
        told = "are not labelled images" if absent else "occur in several folders; write folder/name"
        first = os.fsdecode(names[0])
        raise ValueError(f"{len(names)} of {len(wanted)} names in {file} {told}, the first is {first}")
    return np.unique([rows[0] for rows in found.values()]).astype(np.int64)
