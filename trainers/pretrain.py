"""The training loop, to be read from top to bottom.

python -m trainers pretrain configs/imagenet/moco_v2.yaml configs/guide/contrastive_crop.yaml data.path=photos
python -m trainers pretrain configs/imagenet/moco_v2.yaml configs/guide/contrastive_crop.yaml --resume
torchrun --nproc-per-node 8 -m trainers pretrain configs/imagenet/moco_v2.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dali_views import RegionTable
from dali_views.graph.build import release_memory
from dali_views.system.files import atomic_write, remove_drafts
from dali_views.system.machine import stage
from dali_views.system.stored import whole

from . import config as cfg
from .config import file as config_file
from .data import open_data, step_parts, training_loader
from .encoders.backbones import Backbone
from .engine import checkpoint, optim, ranks
from .engine.interrupt import Interrupt, began, launch
from .engine.lock import held
from .engine.optim import Clock, cosine, lr_at
from .engine.restore import REMEDY, restore
from .engine.setting import Setting, join
from .evaluate.evaluator import Evaluator
from .evaluate.online_probe import OnlineProbe
from .guides import Training, build_guide
from .guides.encoder_maps import check_layers
from .guides.guide import outlook
from .methods import Method, method_of
from .methods.networks import synced_batch_norm
from .report import CONFIG, INDEX, METRICS
from .report.report import Report, check_wandb

__all__ = ["Result", "pretrain"]


START = ("given weights", "untrained")
"""What an encoder is before the first step: with `model.weights`, and without."""


@dataclass
class Result:
    """The outcome of a run."""

    finished: bool
    """False if a signal or `max_steps` ended it early; it can be resumed."""
    step: int
    """Optimiser steps since the beginning of the run, resumed or not."""
    ctrl_c: bool = False
    """Whether this process was stopped by Ctrl-C."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Measures by moment ("untrained", "epoch 10", ...) taken by this process, see `Evaluator`."""


def pretrain(
    config: cfg.Config, resume: bool = False, own_method: Callable[[Backbone, cfg.Own], Method] | None = None
) -> Result:
    """Train as `config` says; with `resume`, continue from the run folder's checkpoint if there is one.

    Processes that torchrun restarts continue by themselves.

    Args:
        own_method: a subclass of `Method`, called with encoder and section, if `method.name` is own.

    Raises:
        BlockingIOError: another process trains in the folder.
        FileExistsError: the folder holds a run and `resume` is False.
        ValueError: parts of the configuration do not fit each other, the data or the run to resume.
        FloatingPointError: the loss or a weight is not finite.
    """
    setting = join(config)
    if config.run.wandb is not None:
        check_wandb()  # fails early if it is missing
    # Checked before images are listed, which may take minutes.
    torch.manual_seed(setting.seed)
    method = method_of(config, own_method)
    method.freeze(config.model.frozen_stages)
    check_layers(config, method.backbone)
    with held(Path(config.run.out)):
        return train(config, setting, method, resume)


def train(config: cfg.Config, setting: Setting, method: Method, resume: bool) -> Result:
    """The part of `pretrain` that holds the run folder's lock."""
    saved = open_run(config, resume)
    if saved is None and config.model.weights is not None:
        method.start_from(config.model.weights)
    out, device = Path(config.run.out), setting.device
    data = open_data(config.data, setting.seed, out / INDEX)
    regions = RegionTable(len(data.train), config.regions)
    loader = training_loader(setting, config.views, data.train, regions, method.split_bn)
    if method.sync_bn and ranks.world() > 1 and device.type == "cuda":
        method = synced_batch_norm(method)
    method = method.to(device).to(memory_format=torch.channels_last)
    online = OnlineProbe(setting, method.encoder, data) if config.run.online_probe else None
    network = wrap(method, config.run.compile, device)
    optimizer = optim.build_optimizer(method, config.optim, method.constant_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=setting.precision is torch.float16)
    training = Training(method, data.train, config.views, setting, out)
    guide = build_guide(config.guide, training)
    evaluator = Evaluator(setting, config, data, method.encoder, regions, online)

    parts = setting.parts
    per_epoch = len(loader) // parts
    total = config.run.epochs * per_epoch
    warmup = round(config.optim.warmup_epochs * per_epoch)
    last = min(total, config.run.max_steps or total)
    keep = {"method": method, "optimizer": optimizer, "scaler": scaler, "regions": regions, "loader": loader,
            "guide": guide}  # fmt: skip
    if online is not None:
        keep["online_probe"] = online
    step, resumed = 0, saved is not None
    if saved is not None:
        saved.setdefault("online_probe", {})  # it may be switched on while a run goes on
        step = put_back(saved, keep, config.run.epochs, setting.batch)
        saved = None  # frees the table and the maps in it
    told = "\n".join(filter(None, (outlook(config), told_of_parts(method, setting), optim.few(total))))
    report = Report(config.run, data, loader, setting.batch, per_epoch, last, step, told)
    result = Result(finished=False, step=step)

    with report, Interrupt() as interrupt:
        if not resumed:
            empty = regions.snapshot()
            guide.begin(regions)
            if regions.writes.any() or guide.passes:  # a pass that wrote no box is worth a line, too
                report.guide(regions, empty, training.found, 0, step)
            if config.run.evaluate_every:
                result.scores[START[config.model.weights is None]] = report.scores(evaluator.run(), 0, step)
            release_memory(setting.kind)
        stop = step >= last
        for epoch in range(loader.epoch, config.run.epochs):
            loader.set_epoch(epoch)
            for batches in step_parts(loader, parts) if not stop else ():
                clock = Clock(step, per_epoch, config.run.epochs)
                lr = lr_at(step, total, warmup, config.optim.peak_lr, config.optim.min_lr)
                optim.set_lr(optimizer, lr, config.optim.peak_lr)
                if config.optim.final_weight_decay is not None:
                    decay = cosine(clock.share, config.optim.weight_decay, config.optim.final_weight_decay)
                    optim.set_weight_decay(optimizer, decay)
                method.before_step(clock)
                optimizer.zero_grad(set_to_none=True)
                loss = torch.zeros((), device=device)
                for part, batch in enumerate(interrupt.batches(batches), 1):
                    ranks.seed_step(setting.seed, step * parts + part - 1)
                    with ranks.averaged(network, part == parts):
                        with stage("trainers: forward"), setting.autocast():
                            losses = guide.losses(network, batch)
                        share = (losses * guide.weights(batch)).mean() / parts
                        with stage("trainers: backward"):
                            scaler.scale(share).backward()  # type: ignore[no-untyped-call]
                    with stage("trainers: guide"):
                        guide.after_batch(batch)
                    if online is not None:
                        online.after_batch(batch)
                    loss += share.detach()
                scaler.unscale_(optimizer)
                if config.optim.clip is not None:
                    optim.clip_each(method.parameters(), config.optim.clip)
                method.after_backward(clock)
                scaler.step(optimizer)
                scaler.update()
                method.after_step(clock)
                if online is not None:
                    with stage("trainers: online probe"):
                        online.after_step(clock)
                step += 1
                report.step(step, epoch, loss, lr, method.embedding, online)
                stop = step == last or interrupt.seen()
                if (stop and step < total) or is_due(step, config.run.checkpoint_every):
                    report.check_loss(step)
                    optim.check_finite(method, f"after step {step}")
                    save(config, keep, step)
                if stop:
                    break
            if stop and step < total:
                break  # the resumed run does what follows an epoch
            report.epoch(step, epoch)
            optim.check_finite(method, f"after step {step}")
            ranks.broadcast_buffers(method)
            before = regions.snapshot()
            if guide.after_epoch(regions, epoch + 1, config.run.epochs):
                report.guide(regions, before, training.found, epoch + 1, step)
                release_memory(setting.kind)
            every, final = config.run.evaluate_every, epoch + 1 == config.run.epochs
            if every and (final or is_due(epoch + 1, every)):
                moment = f"epoch {epoch + 1}"
                result.scores[moment] = report.scores(evaluator.run(), epoch + 1, step)
                release_memory(setting.kind)
            loader.set_epoch(epoch + 1)
            save(config, keep, step)
    result.step, result.finished, result.ctrl_c = step, step == total, interrupt.ctrl_c
    return result


def is_due(number: int, every: int) -> bool:
    """Whether something that happens every `every` times (0: never) happens at `number` (from 1)."""
    return every > 0 and number % every == 0


def told_of_parts(method: Method, setting: Setting) -> str:
    """What accumulation changes besides batch norm, as a line for the start; empty if nothing."""
    if setting.parts == 1 or not method.in_batch:
        return ""
    batch, parts = setting.batch, setting.parts
    return (
        f"the {method.in_batch} of {type(method).__name__} are those of {batch // parts} images, one part of "
        f"a step, not of its {batch} (optim.accumulate {parts})"
    )


def wrap(method: Method, compiled: bool, device: torch.device) -> nn.Module:
    """The method as the loop calls it: compiled if asked for, and spread over processes."""
    network: nn.Module = method
    if compiled:
        torch.compiler.reset()  # a graph of an earlier run in this process lacks the hooks of this one
        network = torch.compile(network)  # type: ignore[assignment]
    if ranks.world() > 1:
        network = ranks.spread(network, device)  # without buffers: MoCo's queue is equal everywhere
    return network


def open_run(config: cfg.Config, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to continue, or None for a new run; writes the resolved configuration."""
    folder = Path(config.run.out)
    try:
        saved = checkpoint.load_run(folder)
    except FileNotFoundError:
        saved = None
    if not ranks.all_equal(saved["step"] if saved else -1):
        raise ValueError(
            f"the processes find different checkpoints in {folder}; set run.out to a folder of all machines"
        )
    if saved is not None and not (resume or began(saved.get("launch", ""))):
        raise FileExistsError(
            f"{folder} holds a run already; continue it with --resume or choose another run.out"
        )
    if saved is not None:
        changed = config_file.differences(config_file.parse(saved["config"]), config)
        # These do not change what is trained: device, threads, evaluations, caches.
        free = ("run.", "localise.", "knn.", "probe.", "finetune.", "data.cache_")
        told = [
            f"{key} {old} and not {new}"
            for key, (old, new) in changed.items()
            if not key.startswith(free) or key in ("run.seed", "run.epochs")
        ]
        if told:
            raise ValueError(
                f"the run in {folder} was begun with {', '.join(told)}; continue it with these values, or "
                "choose another run.out"
            )
    if ranks.is_main():
        for name in (CONFIG, INDEX, METRICS):
            remove_drafts(folder / name)
        with atomic_write(folder / CONFIG) as file:
            file.write(config_file.dump(config).encode())
        if saved is None:
            (folder / INDEX).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
    return saved


def put_back(saved: Mapping[str, Any], keep: Mapping[str, Any], epochs: int, batch: int) -> int:
    """Restore all parts of a run, `batch` images a step; returns the step. Errors as of `restore`."""
    per_epoch = len(keep["loader"].index) // batch

    def agree(found: Mapping[str, Any]) -> None:
        place = found["loader"]
        step = place["epoch"] * per_epoch + place["position"] // batch
        if found["step"] != step:
            raise ValueError(
                f"the checkpoint has step = {found['step']}, but its loader has come to {step}; {REMEDY}"
            )

    return int(restore(saved, keep, {"step": whole(0, epochs * per_epoch)}, agree)["step"])


def save(config: cfg.Config, keep: Mapping[str, Any], step: int) -> None:
    """Write a checkpoint of everything that the next step depends on. Called on all ranks."""
    ranks.broadcast_buffers(keep["method"])
    for part in (keep["guide"], keep["loader"], keep.get("online_probe")):
        if part is not None:
            part.sync()
    if ranks.is_main():
        state = {name: part.state_dict() for name, part in keep.items()}
        state["loader"]["table"] = None  # saved once, as `regions`
        method = keep["method"]
        encoder = next(name for name, part in method.named_modules() if part is method.encoder)
        about = {"config": config_file.dump(config), "step": step, "launch": launch(), "encoder": encoder}
        checkpoint.save(config.run.out, {**about, **state})
