"""The training loop, to be read from top to bottom.

python -m trainers pretrain configs/imagenet/moco_v2.yaml configs/guide/contrastive_crop.yaml data.path=photos
python -m trainers pretrain configs/imagenet/moco_v2.yaml configs/guide/contrastive_crop.yaml --resume
torchrun --nproc-per-node 8 -m trainers pretrain configs/imagenet/moco_v2.yaml
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dali_views import RegionTable
from dali_views.system.files import atomic_write
from dali_views.system.machine import stage

from . import config as cfg
from .config import file as config_file
from .data import open_data, training_loader
from .engine import checkpoint, optim
from .engine import ranks as distributed
from .engine.amp import autocast, device_kind, precision
from .engine.interrupt import Interrupt
from .engine.schedules import Clock, cosine, lr_at
from .evaluate import Evaluator
from .guides import build_guide
from .guides.localise import check_layers
from .guides.schedule import outlook
from .methods import Method, method_of
from .report import CONFIG, INDEX
from .report.report import Report, wandb_module

__all__ = ["Result", "pretrain"]


@dataclass
class Result:
    """What a run came to."""

    finished: bool
    """False if a signal or `max_steps` ended it early; it can be resumed."""
    step: int
    """Optimiser steps taken since the very beginning."""
    ctrl_c: bool = False
    """Whether this process was asked to stop by Ctrl-C."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Measures by moment ("untrained", "epoch 10", ...) taken by this process, see `Evaluator`."""


def pretrain(config: cfg.Config, resume: bool = False) -> Result:
    """Train as `config` says; with `resume`, continue from the run folder's checkpoint if there is one.

    What torchrun starts again continues by itself what its first processes began.

    Raises:
        FileExistsError: the folder holds a run and `resume` was not asked for.
        ValueError: parts of the configuration do not fit each other, the data or the run to resume.
        FloatingPointError: the loss is no number any more.
    """
    device = distributed.init(device_kind(config))
    if config.run.wandb is not None:
        wandb_module()  # or an error, before the work begins
    # First of all, for images may take minutes to list, and then it is late to tell what does not fit.
    torch.manual_seed(config.run.seed)
    method = method_of(config)
    check_layers(config, method.backbone)
    saved = open_run(config, resume)
    data = open_data(config.data, config.run.seed, Path(config.run.out) / INDEX)
    regions = RegionTable(len(data.train), config.regions)
    loader = training_loader(config, data.train, regions)
    if method.sync_bn and distributed.world() > 1 and device.type == "cuda":
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)  # type: ignore[no-untyped-call]
    method = method.to(device).to(memory_format=torch.channels_last)
    network = wrap(method, config, device)
    optimizer = optim.build_optimizer(method, config.optim, method.constant_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=precision(config) is torch.float16)
    guide = build_guide(config, method, data.train, device)
    evaluator = Evaluator(config, data, method.encoder, regions, device)

    total = config.run.epochs * len(loader)
    warmup = round(config.optim.warmup_epochs * len(loader))
    last = min(total, config.run.max_steps or total)
    keep = {"method": method, "optimizer": optimizer, "scaler": scaler, "regions": regions, "loader": loader,
            "guide": guide}  # fmt: skip
    step = restore(saved, keep) if saved else 0
    resumed, saved = bool(saved), None  # which holds a table and maps, too
    report = Report(config.run, data, loader, config.optim.batch, last, step, outlook(config))
    result = Result(finished=False, step=step)

    with report, Interrupt() as interrupt:
        if not resumed:
            empty = regions.snapshot()
            guide.begin(regions)
            if regions.writes.any():
                report.guide(regions, empty, 0, step)
            if config.run.evaluate_every:
                result.scores["untrained"] = report.scores(evaluator.run(), 0, step)
        stop = step >= last
        for epoch in range(loader.epoch, config.run.epochs):
            loader.set_epoch(epoch)
            regions.check_equal()
            for batch in loader if not stop else ():
                clock = Clock(step, len(loader), config.run.epochs)
                lr = lr_at(step, total, warmup, config.optim.peak_lr, config.optim.floor_lr)
                optim.set_lr(optimizer, lr, config.optim.peak_lr)
                if config.optim.final_weight_decay is not None:
                    decay = cosine(clock.share, config.optim.weight_decay, config.optim.final_weight_decay)
                    optim.set_weight_decay(optimizer, decay)
                distributed.seed_step(config.run.seed, step)
                method.before_step(clock)
                with stage("trainers: forward"), autocast(config, device):
                    losses = network(batch.views, guide.kin(batch))
                loss = (losses * guide.weights(batch)).mean()
                optimizer.zero_grad(set_to_none=True)
                with stage("trainers: backward"):
                    scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                if config.optim.clip is not None:
                    optim.clip_each(method.parameters(), config.optim.clip)
                method.after_backward(clock)
                scaler.step(optimizer)
                scaler.update()
                method.after_step(clock)
                with stage("trainers: guide"):
                    guide.after_step(batch)
                step += 1
                report.step(step, epoch, loss, lr, method.embedding)
                stop = step == last or interrupt.seen()
                if (stop and step < total) or is_due(step, config.run.checkpoint_every):
                    report.check_loss(step)
                    save(config, keep, step)
                if stop:
                    break
            if stop and step < total:
                break  # what belongs after the epoch is done when the run is resumed
            report.check_loss(step)
            distributed.broadcast_buffers(method)
            before = regions.snapshot()
            if guide.after_epoch(regions, epoch + 1, config.run.epochs):
                report.guide(regions, before, epoch + 1, step)
            every, final = config.run.evaluate_every, epoch + 1 == config.run.epochs
            if every and (final or is_due(epoch + 1, every)):
                moment = f"epoch {epoch + 1}"
                result.scores[moment] = report.scores(evaluator.run(), epoch + 1, step)
            loader.set_epoch(epoch + 1)
            save(config, keep, step)
    result.step, result.finished, result.ctrl_c = step, step == total, interrupt.ctrl_c
    return result


def is_due(number: int, every: int) -> bool:
    """Whether something that happens every `every` times, never if 0, happens at `number` (from 1)."""
    return every > 0 and number % every == 0


def wrap(method: Method, config: cfg.Config, device: torch.device) -> nn.Module:
    """The method as the loop calls it: compiled and spread over processes as configured."""
    network: nn.Module = method
    if config.run.compile:
        torch.compiler.reset()  # a graph of an earlier run in this process would not see this one's hooks
        network = torch.compile(network)  # type: ignore[assignment]
    if distributed.world() > 1:
        network = distributed.spread(network, device)  # MoCo's queue is a buffer that need not travel
    return network


def open_run(config: cfg.Config, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to continue, or None for a new run; the resolved configuration is written down."""
    folder = Path(config.run.out)
    try:
        saved = checkpoint.load_run(folder)
    except FileNotFoundError:
        saved = None
    if not distributed.all_equal(saved["step"] if saved else -1):
        raise ValueError(
            f"the processes find different checkpoints in {folder}; let run.out be a folder of all machines"
        )
    if saved is None:
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            _write_config(folder, config)
            (folder / INDEX).unlink(missing_ok=True)  # of a run that did not come to its first checkpoint
        return None
    if not (resume or distributed.began(saved.get("launch", ""))):
        raise FileExistsError(
            f"{folder} holds a run already; continue it with --resume or choose another run.out"
        )
    changed = config_file.differences(config_file.parse(saved["config"]), config)
    # What these hold (device, threads, how to evaluate, what is kept) does not change what is trained.
    free = ("run.", "localise.", "probe.", "finetune.", "data.cache_")
    fixed = [key for key in changed if not key.startswith(free) or key in ("run.seed", "run.epochs")]
    if fixed:
        raise ValueError(
            f"the run in {folder} was begun with another {', '.join(fixed)}; it cannot be continued so"
        )
    if distributed.is_main():
        _write_config(folder, config)
    return saved


def _write_config(folder: Path, config: cfg.Config) -> None:
    with atomic_write(folder / CONFIG) as file:
        file.write(config_file.dump(config).encode())


def save(config: cfg.Config, keep: Mapping[str, Any], step: int) -> None:
    """Write a checkpoint of everything that the next step depends on. Called on all ranks."""
    distributed.broadcast_buffers(keep["method"])
    keep["guide"].sync()
    keep["loader"].sync()
    if distributed.is_main():
        state = {name: part.state_dict() for name, part in keep.items()}
        state["loader"]["table"] = None  # it is kept once, as `regions`
        about = {"config": config_file.dump(config), "step": step, "launch": distributed.launch()}
        checkpoint.save(config.run.out, {**about, **state})


def restore(saved: Mapping[str, Any], keep: Mapping[str, Any]) -> int:
    """Put a checkpoint's state back into the parts; the step it was written after."""
    checkpoint.restore(saved, keep)
    return int(saved["step"])
