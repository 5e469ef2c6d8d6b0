"""The one loop that learns from labels: a linear classifier on an encoder that is frozen or learns with it.

A linear probe and fine-tuning (`classifiers`) are this loop with different recipes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from dali_views import SampleIndex
from dali_views.system.progress import Progress
from dali_views.system.stored import entries, number, sequence

from .. import config as cfg
from ..encoders.backbones import Backbone
from ..engine import checkpoint, interrupt, ranks
from ..engine.lock import held
from ..engine.optim import Lars, check_finite, fused
from ..engine.restore import restore
from ..engine.setting import Setting
from .kept import digest, open_evaluation
from .learners import Learner, Recipe, rate

__all__ = ["Result", "labelled", "train_classifier"]


@dataclass(frozen=True)
class Result:
    """Accuracies are shares in [0, 1] of all labelled test images."""

    curve: list[dict[str, float]]
    """Of every epoch: loss (mean over its training steps), and top1 and top5 of the test images after it."""

    @property
    def top1(self) -> float:
        """After the last epoch: the number to report."""
        return self.curve[-1]["top1"]

    @property
    def top5(self) -> float:
        """After the last epoch; all classes if there are fewer than five."""
        return self.curve[-1]["top5"]

    @property
    def best_epoch(self) -> int:
        """The first epoch, from 1, with the highest top1."""
        scores = [epoch["top1"] for epoch in self.curve]
        return scores.index(max(scores)) + 1

    @property
    def best_top1(self) -> float:
        """After `best_epoch`. Optimistic, because it is selected on the test images, but ContrastiveCrop's
        code (arXiv 2202.03278) and others report it."""
        return self.curve[self.best_epoch - 1]["top1"]


def train_classifier(
    setting: Setting, views: cfg.Views, encoder: Backbone, images: SampleIndex, tests: SampleIndex | None,
    recipe: Recipe, folder: Path, resume: bool = False,
) -> Result:  # fmt: skip
    """Train a linear classifier and test it after every epoch. All ranks take part and return the same.

    The ranks share the batch; a run on another number of ranks takes the same steps. The classifier starts at
    N(0, 0.01) weights, zero bias. After every epoch a checkpoint is written.

    Args:
        encoder: on the device. If frozen, it is in eval mode, batch norm included, and bit for bit the same
            afterwards; otherwise it is changed in place.
        images: to learn from; tests: to be tested on. Those without a label are left out.
        recipe: a batch that the images do not fill, or the ranks do not divide, is reduced, with a warning.
        folder: for the checkpoint.
        resume: continue from the folder's checkpoint, if there is one.

    Raises:
        ValueError: no image of one of the sides has a label, or the run to resume was begun differently.
        BlockingIOError: another process trains in the folder.
        FileExistsError: the folder holds a run and `resume` is False.
        FloatingPointError: the loss or a weight is not finite.
    """
    images, tests = labelled(images, "training"), labelled(tests, "test")
    recipe = replace(recipe, batch=_fitting(recipe.batch, len(images)))
    with held(folder):
        return _train(setting, views, encoder, images, tests, recipe, folder, resume)


def _train(
    setting: Setting, views: cfg.Views, encoder: Backbone, images: SampleIndex, tests: SampleIndex,
    recipe: Recipe, folder: Path, resume: bool,
) -> Result:  # fmt: skip
    device, description = setting.device, _description(setting, views, encoder, images, tests, recipe)
    saved = open_evaluation(folder, description, resume)
    classes = 1 + int(max(images.labels.max(), tests.labels.max()))
    head = nn.Linear(encoder.dim, classes)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(setting.seed))
    nn.init.zeros_(head.bias)
    was_training = encoder.training
    learner = Learner(setting, views, encoder, head.to(device), images, tests, recipe)

    network: nn.Module = learner.module
    if ranks.world() > 1:
        network = ranks.spread(network, device)
    optimizer = _optimizer(learner, recipe)
    # The head is in full precision, so nothing needs scaling while the encoder is frozen.
    scaled = setting.precision is torch.float16 and not learner.frozen
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    keep: dict[str, Any] = {"learner": learner.module, "optimizer": optimizer, "scaler": scaler}
    curve: list[dict[str, float]] = []
    if saved is not None:
        point = entries({"loss": number(), "top1": number(0), "top5": number(0)})
        curve = restore(saved, keep, {"curve": sequence(point)})["curve"]

    lower = f"lower the learning rate, {'probe.lr' if learner.frozen else 'finetune.lr and finetune.head_lr'}"
    steps, main, first = learner.steps, ranks.is_main(), len(curve)
    bar = Progress(recipe.epochs * steps, "step", first * steps, disable=not main)
    for epoch in range(first, recipe.epochs):
        learner.module.train()
        total = torch.zeros((), device=device)
        for step, (inputs, labels) in enumerate(learner.batches(epoch), epoch * steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate(recipe, step, steps)
            ranks.seed_step(setting.seed, step)
            loss = F.cross_entropy(network(inputs), labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
            bar.update()
        mean = float(ranks.all_mean(total)) / steps
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is {mean} in epoch {epoch + 1}; {lower}")
        check_finite(learner.module, f"after epoch {epoch + 1}", lower)
        if main and mean > math.log(classes) and (epoch + 1 == recipe.epochs or _rose(curve, mean)):
            warnings.warn(
                f"the loss of the classifier is {mean:.3g} in epoch {epoch + 1}, where guessing has "
                f"{math.log(classes):.3g}: its learning rate is too high for these features; lower it",
                stacklevel=2,
            )
        top1, top5 = learner.score()
        curve.append({"loss": mean, "top1": top1, "top5": top5})
        bar.note({"epoch": epoch + 1, "loss": f"{mean:.4f}", "top1": f"{top1:.2%}"})
        if main:
            state = {name: part.state_dict() for name, part in keep.items()}
            about = {"description": description, "curve": curve, "launch": interrupt.launch()}
            checkpoint.save(folder, {**about, **state})
    bar.close()
    encoder.train(was_training)
    return Result(curve)


def _rose(curve: Sequence[Mapping[str, float]], loss: float) -> bool:
    """Whether a loss is the first that is above that of the first epoch."""
    losses = [epoch["loss"] for epoch in curve]
    return bool(losses) and loss > losses[0] == max(losses)


def labelled(index: SampleIndex | None, side: str) -> SampleIndex:
    """The labelled images of an index; a ValueError that names its `side` if there are none."""
    if index is None or not (index.labels >= 0).any():
        raise ValueError(
            f"no {side} image has a label; name labelled folders by data.eval_train=DIR data.eval_val=DIR"
        )
    return index if (index.labels >= 0).all() else index.subset(index.labels >= 0)


def _fitting(batch: int, images: int) -> int:
    """The largest batch up to `batch` that the images fill and the ranks divide."""
    world = ranks.world()
    fitting = max(world, min(batch, images) // world * world)
    if fitting != batch and ranks.is_main():
        warnings.warn(
            f"a batch of {batch} does not fit {images} labelled images on {world} processes; "
            f"batches are of {fitting}, with the learning rate in proportion",
            stacklevel=3,
        )
    return fitting


def _optimizer(learner: Learner, recipe: Recipe) -> Optimizer:
    """The optimiser of what learns; every group has its `peak_lr` for the batch."""
    parts: list[tuple[nn.Module, float]] = [(learner.head, recipe.head_lr)]
    if recipe.encoder_lr is not None:
        parts.append((learner.encoder, recipe.encoder_lr))
    groups = [{"params": list(part.parameters()), "peak_lr": lr * recipe.batch / 256} for part, lr in parts]
    momentum, decay = recipe.momentum, recipe.weight_decay
    if recipe.optimizer == "lars":
        return Lars(groups, lr=1.0, momentum=momentum, weight_decay=decay)
    nesterov = recipe.optimizer == "nesterov"
    return fused(torch.optim.SGD, groups, lr=1.0, momentum=momentum, weight_decay=decay, nesterov=nesterov)


def _description(
    setting: Setting, views: cfg.Views, encoder: nn.Module, images: SampleIndex, tests: SampleIndex,
    recipe: Recipe,
) -> dict[str, Any]:  # fmt: skip
    """Everything that the numbers depend on, by the name that a message uses."""
    return {
        **asdict(recipe),
        "run.seed": setting.seed,
        "views.size": views.size,
        "views.mean": views.mean,
        "views.std": views.std,
        "training images": digest({"": images.labels}, images.fingerprint),
        "test images": digest({"": tests.labels}, tests.fingerprint),
        "encoder": digest({name: t.numpy(force=True) for name, t in encoder.state_dict().items()}),
    }
