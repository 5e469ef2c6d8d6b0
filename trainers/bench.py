"""How fast methods and guides train here, what memory they take, and where a step waits for the GPU.

python -m trainers bench photos --methods moco dino --guides none online_crop --csv bench.csv

Each run is `pretrain` itself with the configuration for ImageNet, a few steps long. After a step, the host
should only have launched the work of the GPU: PyTorch reports every operation that waits for it.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from dali_views.data.index import SampleIndex
from dali_views.system.machine import full_memory, machine
from dali_views.tools import options
from dali_views.tools.bench.contest import IMAGES, Row, table, write_csv
from dali_views.tools.command_line import Answer

from . import config as cfg
from .config import file as config_file
from .methods import METHODS
from .pretrain import pretrain

__all__ = ["add", "command"]

GUIDES = ("none", "contrastive_crop", "online_crop", "saliency")
WARM_UP = 5  # steps in which memory is allocated and kernels are chosen
_FILES = {"moco": "moco_v2", "scfs": "scfs_200ep"}  # of configs/imagenet, where it is not the method's name


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add, number = parser.add_argument, options.at_least
    options.add_images(parser)
    options.add_device(parser)
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="all by default")
    add("--guides", nargs="+", choices=GUIDES, default=["none"], help="guides of the crops (none)")
    add("--backbones", nargs="+", default=["resnet50"], metavar="NAME", help="encoders (resnet50)")
    add("--size", type=number(1), default=224, help="side of a (global) view, pixels (224)")
    add("--batch-size", type=number(2), default=256, help="images per step (256)")
    add("--steps", type=number(1), default=20, help="measured steps (20)")
    add("--minutes", type=float, default=math.inf, help="start no further run after this time")
    add("--csv", type=Path, help="write the results here too")


def command(args: argparse.Namespace) -> Answer:
    """`bench`: a few rows per run; exit code 1 if one fails or waits for the GPU."""
    index = options.open_index(args)
    if index.form != "names":
        raise ValueError(f"{index.root} holds no files of its own; give a folder of images or a list of them")
    device, end = options.device(args), time.monotonic() + 60 * args.minutes
    setting = {
        "size": args.size, "batch_size": args.batch_size, "images": len(index), "steps": args.steps,
        "machine": machine(device),
    }  # fmt: skip
    with TemporaryDirectory(prefix="bench-") as folder:
        _link(index, Path(folder, "images"), (WARM_UP + args.steps + 1) * args.batch_size)
        rows, wrong = _runs(args, Path(folder), device, setting, end)
    return Answer({"rows": [asdict(row) for row in rows], "wrong": wrong}, table(rows), int(wrong > 0))


def _link(index: SampleIndex, folder: Path, count: int) -> None:
    """`count` names for the images, so that an epoch is long however few there are."""
    folder.mkdir()
    for number in range(count):
        path = os.path.abspath(index.path(number % len(index)))
        (folder / f"{number:06d}{Path(path).suffix}").symlink_to(path)


def _runs(
    args: argparse.Namespace, folder: Path, device: str, setting: Mapping[str, str | int | float], end: float
) -> tuple[list[Row], int]:
    """The rows of all runs that fit into the time, and how many runs failed or waited."""
    rows: list[Row] = []
    wrong, longest = 0, 0.0
    runs = [(m, b, g) for b in args.backbones for m in args.methods for g in args.guides]
    for method, backbone, guide in runs:
        name, began = f"{method}, {backbone}" + f", {guide}" * (guide != "none"), time.monotonic()
        if began + longest > end:
            print(f"left out: {name} (no time left)")
            continue
        try:
            found, waits = _run(_config(args, folder, device, method, backbone, guide))
        except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
            memory = full_memory(error)
            why = f"the {memory} is full; lower --batch-size" if memory else error
            print(f"failed: {name} ({' '.join(str(why).split()):.300})")
            wrong += 1
            continue
        finally:
            shutil.rmtree(folder / "run", ignore_errors=True)
        for place, times in waits.most_common():
            print(f"waits for the GPU: {name}, {times} times in {args.steps} steps, at {place}")
        wrong += any(
            "grad_scaler" not in place for place in waits
        )  # float16 asks whether gradients overflowed
        about: dict[str, Any] = {"setting": setting, "kind": "ours", "device": device}
        rows += [Row("steps", f"{name}{what}", measure, value, **about) for what, measure, value in found]
        if args.csv is not None:
            write_csv(rows, args.csv)  # after every run, for the next may be killed
        longest = max(longest, time.monotonic() - began)
    return rows, wrong


def _config(
    args: argparse.Namespace, folder: Path, device: str, method: str, backbone: str, guide: str
) -> cfg.Config:
    """The published configuration on a folder of images, of which no epoch ends during the run."""
    changes = [
        f"run.out={folder}/run", f"run.device={device}", f"run.max_steps={WARM_UP + args.steps}",
        "run.epochs=100", "run.evaluate_every=0", f"run.log_every={10**9}", f"data.path={folder}/images",
        "data.eval_val=null", "data.val_share=0", f"views.size={args.size}", f"model.backbone={backbone}",
        f"optim.batch={args.batch_size}",
    ]  # fmt: skip
    if guide != "none":
        changes += ["views.crop=contrastive", f"guide.name={guide}", "guide.warmup=0"]
    return config_file.load(f"configs/imagenet/{_FILES.get(method, method)}.yaml", changes)


def _run(config: cfg.Config) -> tuple[list[tuple[str, str, float]], Counter[str]]:
    """What one run measures (name, unit, value), and how often it waited for the GPU at which line."""
    on_gpu, last = config.run.device == "gpu", config.run.max_steps
    step, clock = 0, [0.0, 0.0]

    def after_step(optimizer: Any, *_: Any) -> None:
        nonlocal step
        step += 1
        if step in (WARM_UP, last):
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
            clock[step == last] = time.perf_counter()
            if on_gpu and step == WARM_UP:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.set_sync_debug_mode("warn")  # "error" would show the first place only

    hook = register_optimizer_step_post_hook(after_step)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            pretrain(config)
    finally:
        hook.remove()
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        gc.collect()  # the parts of a run refer to each other, so only this frees its memory
    waits = Counter(f"{w.filename}:{w.lineno}" for w in told if "synchronizing CUDA" in str(w.message))
    steps = (last or 0) - WARM_UP
    found = [("", IMAGES, round(config.optim.batch * steps / (clock[1] - clock[0]), 1))]
    if on_gpu:
        found += [
            (": waits for the GPU", f"in {steps} steps", float(waits.total())),
            (": peak of PyTorch's memory", "MiB", round(torch.cuda.max_memory_allocated() / 2**20)),
        ]
        torch.cuda.empty_cache()
    return found, waits
