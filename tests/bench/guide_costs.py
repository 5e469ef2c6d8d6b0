"""What boxes cost: epochs without a guide and with online maps, a localisation pass; medians of turns.

python tests/bench/guide_costs.py CONFIG OUT.csv [key=value ...]

CONFIG has guide.name online_crop. The passes look at the same layer at the same size.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dali_views import RegionTable
from dali_views.system.machine import machine
from trainers import config as cfg
from trainers.config import file as config_file
from trainers.data import open_data, training_loader
from trainers.engine import optim
from trainers.engine.setting import join
from trainers.guides import Training
from trainers.guides.contrastive_crop import ContrastiveCrop
from trainers.guides.online_crop import OnlineCrop
from trainers.methods import Method, method_of

ROUNDS = 3


def main(file: Path, out: Path, changes: list[str]) -> None:
    config = config_file.load(file, changes)
    assert isinstance(config.guide, cfg.OnlineCrop), "give a configuration with guide.name online_crop"
    setting = join(config)
    device = setting.device
    index = open_data(config.data, config.run.seed).train
    regions = RegionTable(len(index))
    loader = training_loader(setting, config.views, index, regions)
    # Two equal networks, for the one that online maps come from keeps its hook.
    bare, method = (method_of(config).to(device).to(memory_format=torch.channels_last) for _ in range(2))
    optimizers = {
        each: optim.build_optimizer(each, config.optim, each.constant_lr) for each in (bare, method)
    }
    guide = config.guide
    online = OnlineCrop(guide, Training(method, index, config.views, setting, Path(config.run.out)))
    shown = {"layer": guide.layer, "size": guide.size, "warmup": 0}
    published = {"threshold": 0.1, "reading": "extent", "rate": 1.0, "aligned": False, "skip_whole": False}
    training = Training(bare, index, config.views, setting, Path(config.run.out))
    ours = ContrastiveCrop(cfg.ContrastiveCrop(**shown), training)
    theirs = ContrastiveCrop(cfg.ContrastiveCrop(**shown, **published), training)
    epochs = iter(range(10**6))

    def train(method: Method, after_batch: Callable[..., None]) -> None:
        optimizer = optimizers[method]
        loader.set_epoch(next(epochs))
        for batch in loader:
            with setting.autocast():
                loss = method(batch.views).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            after_batch(batch)

    def plain() -> None:
        train(bare, lambda batch: None)

    def with_maps() -> None:
        train(method, online.after_batch)

    def read() -> None:
        online.after_epoch(regions, guide.warmup + guide.interval, 10**6)

    turns = {
        "epoch": plain, "epoch with online maps": with_maps, "online boxes": read,
        "pass": lambda: ours.begin(regions), "pass as published": lambda: theirs.begin(regions),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(ROUNDS + 1):
        for name, turn in turns.items():
            began = time.perf_counter()
            turn()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round builds graphs
                seconds[name].append(time.perf_counter() - began)
    with out.open("w", newline="") as table:
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["what", "seconds", "share_of_epoch", "rounds", "images", "machine"])
        for name, each in seconds.items():
            share = statistics.median(a / b for a, b in zip(each, seconds["epoch"], strict=True))
            told = " ".join(f"{value:.2f}" for value in each)
            row = [name, f"{statistics.median(each):.2f}", f"{share:.3f}", told, len(index)]
            writer.writerow([*row, machine(setting.kind)])
            print(f"{name:24s} {row[1]:>8s} s  {100 * share:6.1f} % of an epoch")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
