"""Small runs of the trainer: a configuration, a process, and what the run left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock

from dali_views.tools.scenes import CLASSES, make_scenes
from trainers import cli
from trainers import pretrain as loop
from trainers.config import Config
from trainers.engine import checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "run": dict(epochs=3, evaluate_every=0, log_every=1, checkpoint_every=1, device="cpu", threads=1),
    "views": {"size": 16, "crop": "contrastive", "blur": 0},
    "model": {"backbone": "resnet10"},
    "guide": {"name": "contrastive_crop", "warmup": 1, "interval": 1, "size": 64, "skip_whole": False},
    "optim": {"name": "sgd", "lr": 0.1, "batch": 16},
}


def scenes_in(folder: Path) -> dict[str, str]:
    """Sixty-four small scenes as a `data` section; 48 of them are trained on."""
    images, instances = make_scenes(folder, 64, size=48)
    return {"kind": "coco", "path": str(images), "instances": str(instances), "val_share": 0.25}


def write_config(folder: Path, data: dict, **changes: dict) -> Path:
    """A configuration file of a small run into `folder`/run."""
    tree = {**SMALL, "data": data, **changes}
    tree["run"] = {**SMALL["run"], "out": str(folder / "run"), **changes.get("run", {})}
    file = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(tree))
    return file


def plain_run(folder: Path, scenes: int, **run: int) -> Path:
    """The folder of a run without a guide on scenes of three kinds, half of them held out."""
    images, instances = make_scenes(folder, scenes, 48, CLASSES[:3])
    data = {"kind": "coco", "path": str(images), "instances": str(instances), "val_share": 0.5}
    plain = {"guide": {"name": "none"}, "views": {"size": 16, "blur": 0}}
    assert cli.main(["pretrain", str(write_config(folder, data, run={"epochs": 1, **run}, **plain))]) == 0
    return folder / "run"


@contextmanager
def copied_at(step: int, copy: Path) -> Iterator[None]:
    """`copy` is the folder of a run trained inside, as a kill after the checkpoint of `step` leaves it."""
    save = loop.save

    def saving(config: Config, keep: Mapping[str, Any], at: int) -> None:
        save(config, keep, at)
        if at == step:
            shutil.copytree(config.run.out, copy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save", saving)
        yield


@contextmanager
def signalled(number: int, run: Path, lines: int) -> Iterator[None]:
    """Sends a signal to this process once the log of a run has so many lines."""
    metrics, over = run / "metrics.jsonl", threading.Event()

    def send() -> None:
        while not over.is_set():
            if metrics.exists() and metrics.read_text().count("\n") >= lines:
                os.kill(os.getpid(), number)
                return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills once a session, for all processes of the tests. Nobody changes it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "made").touch()
    return folder


def lines_of(run: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def curve(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of every logged step."""
    return [(line["step"], line["loss"]) for line in lines_of(folder / "run") if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in checkpoint.load(folder / "run")["method"].items() if torch.is_tensor(v)}


def launch(arguments: list[str], **options: object) -> subprocess.Popen:
    """The trainer as a user starts it, in a process of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, **options,
    )  # fmt: skip
