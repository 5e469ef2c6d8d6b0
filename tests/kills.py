"""Kill a small training run at random instants until it is through, again and again.

python tests/kills.py --kills 100 --out kills

Every life is the trainer's own command in a process of its own, ended by SIGKILL at an instant drawn from all
its length: indexing, steps, checkpoints, guidance. After every kill the newest checkpoint must be readable;
every run that has come through must have left, bit for bit, the checkpoint of an undisturbed one.
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from by_hand import start
from runs import scenes_in, write_config
from torch.utils._pytree import keystr, tree_flatten_with_path

from trainers import cli
from trainers.engine import checkpoint

# A checkpoint after every step, and as many parts as can have a state of their own.
RUN: dict[str, Any] = {
    "views": {"size": 32, "crop": "contrastive", "blur": 0},
    "model": {"backbone": "test_resnet"},
    "method": {"name": "moco", "queue": 64},
    "guide": {"name": "online_crop", "warmup": 1, "interval": 1},
    "optim": {"name": "sgd", "lr": 0.1, "batch": 8},
}


def live(folder: Path, seconds: float | None) -> tuple[int | None, float]:
    """One life of the run, killed after so many seconds: exit code, and its length in seconds."""
    began = time.monotonic()
    arguments = ["pretrain", str(folder / "config.yaml"), "--resume"]
    (process,) = start(1, folder, cli.main, lambda rank: [arguments])
    process.join(seconds)
    process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise AssertionError(f"the run did not come up again:\n{(folder / '0.log').read_text()}")
    return process.exitcode, time.monotonic() - began


def survive(folder: Path, whole: float, draw: random.Random) -> int:
    """Kill the run until it is through; how often that was. Undisturbed it takes `whole` seconds."""
    for kills in itertools.count():
        if live(folder, draw.uniform(0, 1.2 * whole))[0] == 0:
            return kills
        if (folder / "run" / checkpoint.LAST).exists():
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # one that falls back to the previous checkpoint warns
                checkpoint.load(folder / "run")


def differences(one: Any, other: Any) -> list[str]:
    """Where two checkpoints differ; tensors are compared bit for bit."""

    def leaves(state: Any) -> dict[str, Any]:
        found, _ = tree_flatten_with_path(state)
        return {
            keystr(place): value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
            for place, value in found
        }

    mine, theirs = leaves(one), leaves(other)
    return [place for place in mine.keys() | theirs if mine.get(place) != theirs.get(place)]


def runs_that_survive(
    folder: Path, kills: int, seed: int, epochs: int, device: str = "cpu"
) -> Iterator[tuple[int, Path, list[str]]]:
    """Kills so far, folder of a run that has come through, and where it differs from an undisturbed one.

    Runs follow each other until there were so many kills.
    """
    draw = random.Random(seed)
    scenes = scenes_in(folder / "scenes")

    def begin(name: str) -> Path:
        write_config(folder / name, scenes, **RUN, run={"epochs": epochs, "device": device})
        return folder / name

    for name in ("first", "undisturbed"):  # the first one waits for the imports of all
        _, whole = live(begin(name), None)
    expected = checkpoint.load(folder / "undisturbed" / "run")
    count = 0
    for number in itertools.count():
        run = begin(f"run-{number}")
        count += survive(run, whole, draw)
        # The configuration names the run's folder.
        found = {**checkpoint.load(run / "run"), "config": expected["config"]}
        yield count, run, differences(found, expected)
        if count >= kills:
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--epochs", type=int, default=12, help="of six steps each")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "kills")
    args = parser.parse_args()
    for count, folder, wrong in runs_that_survive(args.out, args.kills, args.seed, args.epochs, args.device):
        told = f"differs from the undisturbed run in {', '.join(wrong)}" if wrong else "came through"
        print(f"{folder} {told}; {count} kills so far", flush=True)
        if wrong:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
