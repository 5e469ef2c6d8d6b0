"""Kill a small training run at random instants until it is through, again and again.

python tests/kills.py --kills 100 --out kills

Every life is the trainer's own command in a process of its own, ended by SIGKILL at an instant drawn from all
its length: imports, indexing, steps, checkpoints, evaluation. After every kill the newest checkpoint must be
readable; every run that has come through must have left, bit for bit, the checkpoint of an undisturbed one.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml

from dali_views.scenes import make_scenes
from trainers import checkpoint

ROOT = Path(__file__).resolve().parents[1]


def small_run(folder: Path, out: Path, epochs: int = 6) -> Path:
    """The configuration of a guided run over generated scenes with a checkpoint after every step."""
    images, instances = make_scenes(folder / "scenes", 64, size=48)
    tree = {
        "run": {"out": str(out), "epochs": epochs, "evaluate_every": 2, "log_every": 1, "checkpoint_every": 1,
                "device": "cpu", "threads": 1},
        "data": {"kind": "coco", "path": str(images), "instances": str(instances), "val_share": 0.25},
        "views": {"size": 16, "crop": "contrastive", "blur": 0},
        "model": {"backbone": "resnet10"},
        "method": {"name": "moco", "queue": 64},
        "guide": {"name": "online_crop", "warmup": 1, "interval": 1},
        "optim": {"name": "sgd", "lr": 0.1, "batch": 8},
    }  # fmt: skip
    file = folder / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def live(config: Path, seconds: float | None) -> tuple[int, float]:
    """One life of the run, killed after so many seconds: exit code, and its length in seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "trainers", "pretrain", str(config), "--resume"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        try:
            output = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0]
    if process.returncode not in (0, -9):
        raise AssertionError(f"the run did not come up again:\n{output}")
    return process.returncode, time.monotonic() - began


def survive(config: Path, out: Path, whole: float, draw: random.Random) -> int:
    """Kill the run until it is through; how often that was. Undisturbed it takes `whole` seconds."""
    kills = 0
    while True:
        code, _ = live(config, draw.uniform(0, 1.2 * whole))
        if code == 0:
            return kills
        kills += 1
        if (out / checkpoint.LAST).exists():
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # one that falls back to the previous checkpoint warns
                checkpoint.load(out)


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two checkpoints differ; tensors are compared bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [where for key in one for where in differences(one[key], other[key], f"{place}.{key}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [where for i, pair in pairs for where in differences(*pair, f"{place}[{i}]")]
    else:
        same = bool(one == other)
    return [] if same else [place]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "kills")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    config = small_run(args.out, args.out / "undisturbed")
    _, whole = live(config, None)
    expected = checkpoint.load(args.out / "undisturbed")
    kills = runs = 0
    while kills < args.kills:
        out = args.out / f"run-{runs}"
        kills += survive(small_run(args.out, out), out, whole, draw)
        runs += 1
        found = {**checkpoint.load(out), "config": expected["config"]}  # which names the run's folder
        if wrong := differences(found, expected):
            print(f"{out} differs from the undisturbed run in {', '.join(wrong)}")
            return 1
        print(
            f"{runs} runs came through {kills} kills, each with the undisturbed run's checkpoint", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
