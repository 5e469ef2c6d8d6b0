"""The loop that trains a detector, to be read from top to bottom; and its test."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from dali_views import ViewLoader
from dali_views.graph.build import release_memory
from dali_views.system.files import atomic_write
from dali_views.system.ranks import all_gather_bytes
from dali_views.system.stored import whole

from .. import config as cfg
from ..config import file as config_file
from ..data import DataSets
from ..encoders.backbones import Backbone
from ..engine import checkpoint, interrupt, optim, ranks
from ..engine.lock import held
from ..engine.restore import restore
from ..engine.setting import Setting
from ..evaluate.evaluator import Evaluation
from ..evaluate.kept import digest, open_evaluation
from ..report import CONFIG
from ..report.report import Report
from . import scores
from .model import Detector
from .scores import Found
from .sides import open_sets
from .targets import loader_to_test, loader_to_train, targets_of, views_of
from .truth import Truth, mask_tools

__all__ = ["Result", "train_detector"]


@dataclass
class Result:
    """The outcome of a detector's training."""

    finished: bool
    """False if a signal or `run.max_steps` ended it early; it can be resumed."""
    step: int
    """Optimiser steps since its beginning, resumed or not."""
    ctrl_c: bool = False
    """Whether this process was stopped by Ctrl-C."""
    scores: dict[str, float] = field(default_factory=dict)
    """Shares in [0, 1] of the last test, see `scores`; empty if there was none."""


def train_detector(
    config: cfg.Config, setting: Setting, encoder: Backbone, folder: Path, resume: bool = False
) -> Result:
    """Train a detector on an encoder, which is changed in place, as `config.detect` says, and test it.

    Args:
        folder: for checkpoints, curves and report.
        resume: continue from the folder's checkpoint if there is one, also within an epoch.

    Raises:
        ValueError: encoder, annotations, masks or batch do not fit, or the run to resume was begun otherwise.
        BlockingIOError: another process trains in the folder.
        FileExistsError: the folder holds a run and `resume` is False.
        FloatingPointError: the loss or a weight is not finite.
    """
    mask_tools()  # fails early if it is missing
    with held(folder):
        return _train(config, setting, encoder, folder, resume)


def _train(config: cfg.Config, setting: Setting, encoder: Backbone, folder: Path, resume: bool) -> Result:
    section, device = config.detect, setting.device
    train, tests = open_sets(config, setting.seed)
    masks = train.masked if section.masks is None else section.masks
    if masks and not (train.masked and tests.masked):
        raise ValueError("detect.masks is true and some objects have no mask; set it to false")
    torch.manual_seed(setting.seed)
    description = _description(config, setting, encoder, train, tests)
    detector = Detector(encoder, len(train.classes), section, masks, setting)
    saved = open_evaluation(folder, description, resume)
    loader = loader_to_train(setting, config.views, section, train.index, ranks.world())
    tester = loader_to_test(setting, config.views, section, tests.index, ranks.world())
    network = ranks.spread(detector, device) if ranks.world() > 1 else detector
    groups = optim.param_groups(detector, section.weight_decay)
    optimizer = optim.fused(torch.optim.SGD, groups, lr=section.lr, momentum=section.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=setting.precision is torch.float16)
    keep: dict[str, Any] = {"detector": detector, "optimizer": optimizer, "scaler": scaler, "loader": loader}

    def save() -> None:
        report.check_loss(step)
        optim.check_finite(detector, f"after step {step}", "lower detect.lr")
        ranks.broadcast_buffers(detector)
        loader.sync()
        if ranks.is_main():
            state = {name: part.state_dict() for name, part in keep.items()}
            about = {"description": description, "step": step, "launch": interrupt.launch()}
            checkpoint.save(folder, {**about, **state})

    step, total, per_epoch = 0, section.steps, len(loader)
    if saved is not None:
        step, saved = int(restore(saved, keep, {"step": whole(0, total)})["step"]), None
    last = min(total, config.run.max_steps or total)
    run = _written(config, folder)
    images = DataSets(train.index, train.index, None)
    kind = "boxes and masks" if masks else "boxes"
    told = f"{kind} of {len(train.classes)} classes, {len(tests.index)} test images"
    report = Report(run, images, loader, section.batch, per_epoch, last, step, told, total)
    result = Result(finished=False, step=step)
    with report, interrupt.Interrupt() as signals:
        stop = step >= last
        for epoch in count(loader.epoch):
            if stop:
                break
            loader.set_epoch(epoch)
            for batch in signals.batches(loader):
                rate = lr_at(section, step)
                optim.set_lr(optimizer, rate, section.lr)
                ranks.seed_step(setting.seed, step)
                loss = network(*targets_of(train, batch, masks))
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                step += 1
                report.step(step, epoch, loss, rate)
                stop = step == last or signals.seen()
                if stop or (config.run.checkpoint_every and step % config.run.checkpoint_every == 0):
                    save()
                if stop:
                    break
            else:
                loader.set_epoch(epoch + 1)
                save()
                if section.evaluate_every and (epoch + 1) % section.evaluate_every == 0:
                    report.scores(Evaluation(measure(detector, tests, tester), None), epoch + 1, step)
                    release_memory(setting.kind)
        if step == total:
            found = Evaluation(measure(detector, tests, tester), None)
            result.scores = found.scores
            report.scores(found, math.ceil(total / per_epoch), step)
    result.step, result.finished, result.ctrl_c = step, step == total, signals.ctrl_c
    return result


def lr_at(section: cfg.Detect, step: int) -> float:
    """Learning rate of step number `step`, from 0; detectron2's WarmupMultiStepLR."""
    begun = 1.0 if step >= section.warmup else step / section.warmup
    fallen: float = 0.1 ** sum(step >= drop for drop in section.drops)
    return section.lr * (0.001 * (1 - begun) + begun) * fallen


@torch.no_grad()
def measure(detector: Detector, tests: Truth, loader: ViewLoader) -> dict[str, float]:
    """Scores of a detector on all test images that can be read; equal on all ranks."""
    ranks.broadcast_buffers(detector)
    detector.eval()
    found: dict[int, Found] = {}
    for batch in loader:
        views = views_of(batch)
        for (row, image, _), out in zip(views, detector([image for _, image, _ in views]), strict=True):
            height, width = tests.index.sizes[row].tolist()
            found[row] = in_image(out, (int(image.shape[1]), int(image.shape[2])), (height, width))
    detector.train()
    if ranks.world() == 1:
        return scores.scores(tests, found)
    mine = [
        [row, each.boxes.tolist(), each.labels.tolist(), each.scores.tolist(), each.masks]
        for row, each in found.items()
    ]
    parts = all_gather_bytes(json.dumps(mine).encode())
    measured: dict[str, float] = {}
    if ranks.is_main():
        for part in parts:
            for row, boxes, labels, rated, masks in json.loads(part):
                found[row] = Found(
                    np.array(boxes, np.float64).reshape(-1, 4), np.array(labels, np.int64),
                    np.array(rated, np.float64), masks,
                )  # fmt: skip
        measured = scores.scores(tests, found)
    return dict(json.loads(all_gather_bytes(json.dumps(measured).encode())[0]))


def in_image(out: dict[str, Tensor], shape: tuple[int, int], size: tuple[int, int]) -> Found:
    """Detections in a view of `shape` as those in its image of `size` (height and width in pixels)."""
    scale = torch.tensor([size[1] / shape[1], size[0] / shape[0]] * 2, device=out["boxes"].device)
    boxes = out["boxes"].float() * scale
    masks = None
    if "masks" in out:
        tools, masks = mask_tools(), []
        pasted = paste_masks_in_image(out["masks"].float(), boxes, size)[:, 0] > 0.5
        for mask in pasted.cpu().numpy().astype(np.uint8):
            lengths = tools.encode(np.asfortranarray(mask))
            masks.append({"size": list(size), "counts": lengths["counts"].decode()})
    labels, rated = (out[name].cpu().numpy() for name in ("labels", "scores"))
    return Found(boxes.double().cpu().numpy(), labels, rated.astype(np.float64), masks)


def _description(
    config: cfg.Config, setting: Setting, encoder: Backbone, train: Truth, tests: Truth
) -> dict[str, Any]:
    """Everything that the numbers depend on, by the name that a message uses."""
    free = ("evaluate_every",)
    own = {
        f"detect.{k}": json.dumps(v)
        for k, v in config.detect.model_dump(mode="json").items()
        if k not in free
    }
    return {
        **own,
        "run.seed": setting.seed,
        "training images": _content(train),
        "test images": _content(tests),
        "encoder": digest({name: t.numpy(force=True) for name, t in encoder.state_dict().items()}),
    }


def _content(truth: Truth) -> str:
    boxes = {str(row): each.boxes for row, each in enumerate(truth.objects)}
    return digest(boxes, truth.index.fingerprint)


def _written(config: cfg.Config, folder: Path) -> cfg.Run:
    """The configuration, written into the folder for its page; without what guided the pretraining."""
    run = config.run.model_copy(update={"out": str(folder)})
    plain = {"crop": "random", "second_crop": None, "local_crop": None, "partner": "none"}
    views = config.views.model_copy(update=plain)
    if ranks.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        told = config.model_copy(update={"run": run, "views": views, "guide": cfg.NoGuide()})
        with atomic_write(folder / CONFIG) as file:
            file.write(config_file.dump(told).encode())
    return run
