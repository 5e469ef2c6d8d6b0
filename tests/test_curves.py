"""Twenty steps of every method on generated scenes: the loss falls, nothing collapses, a resume is exact.

No curve is stored: processors and versions of PyTorch round differently, and twenty steps amplify that to
several per cent. `test_losses.py` compares each loss with its paper's formula.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import copied_at

from dali_views.tools.scenes import make_scenes
from trainers.config import file as config_file
from trainers.engine import checkpoint
from trainers.pretrain import pretrain
from trainers.report.measures import Collapse

STEPS = 20
TWO_VIEWS = {"name": "simclr", "size": 32, "crop": "contrastive", "blur": 0}
MILD = {**TWO_VIEWS, "name": "moco_v2", "scale": [0.6, 1]}
MULTI_CROP = {
    **TWO_VIEWS, "name": "dino", "scale": [0.25, 1], "locals": 2, "local_size": 16,
    "local_scale": [0.05, 0.25],
}  # fmt: skip
SMALL = {"hidden_dim": 64, "output_dim": 32}
DINO = {
    **SMALL, "bottleneck_dim": 16, "output_dim": 64, "bn": True, "momentum": 0.9, "freeze_last_layer": 0.25,
}  # fmt: skip
LAYERS = {"layer_bottleneck": 16, "layer_hidden": 64, "layer_output": 32}
MOCO = {"queue": 16, "momentum": 0.9, "split_bn": 2, "bn": True}
# Method, views, and a learning rate at which twenty steps of so small a network show progress.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "simclr": ({"name": "simclr", **SMALL, "temperature": 0.2}, TWO_VIEWS, 0.01),
    "moco": ({"name": "moco", **SMALL, **MOCO, "temperature": 0.1}, MILD, 0.05),
    "byol": ({"name": "byol", **SMALL, "momentum": 0.9}, TWO_VIEWS, 0.05),
    "simsiam": ({"name": "simsiam", **SMALL, "predictor_dim": 16}, TWO_VIEWS, 0.5),
    "dino": ({"name": "dino", **DINO}, MULTI_CROP, 0.01),
    "scfs": ({"name": "scfs", **DINO, **LAYERS}, MULTI_CROP, 0.01),
}
FIRST = {"moco": 1}  # step from which on the queue holds keys, and not the noise it started with


CCROP = {"name": "contrastive_crop", "warmup": 1, "interval": 1, "size": 64, "threshold": 0.5}


def configuration(
    name: str, data: dict[str, Any], out: Path, guide: dict[str, Any] = CCROP, **more: Any
) -> Path:
    """The file of a run of twenty steps, guided from the second epoch on; `more` goes to its views."""
    method, views, rate = METHODS[name]
    tree = {
        "run": {
            "out": str(out / "run"), "epochs": 4, "evaluate_every": 0, "log_every": 1, "device": "cpu",
            "threads": 1,
        },
        "data": data,
        "views": {**views, **more},
        "model": {"backbone": "test_resnet"},  # timm's smallest
        "method": method,
        "guide": guide,
        "optim": {"name": "sgd", "lr": rate, "lr_scaling": False, "batch": 16},
    }  # fmt: skip
    file = out / "config.yaml"
    file.write_text(json.dumps(tree))
    return file


def scenes_of(folder: Path) -> dict[str, Any]:
    images, instances = make_scenes(folder, 80, size=48)
    return {"kind": "coco", "path": str(images), "instances": str(instances), "val_share": 0}


def curve(out: Path, key: str = "loss") -> list[float]:
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    noted = [json.loads(line) for line in lines]
    return [line[key] for line in noted if key in line]  # guides write lines of their own


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return scenes_of(tmp_path_factory.mktemp("scenes"))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:half of the boxes")
def test_the_loss_falls_and_a_resumed_run_is_the_same(
    name: str, scenes: dict[str, Any], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out in (whole, parts):
        out.mkdir()
    with copied_at(8, parts / "run"):  # in the middle of the second epoch
        pretrain(config_file.load(configuration(name, scenes, whole), ["run.checkpoint_every=8"]))
    losses = curve(whole)
    assert len(losses) == STEPS
    assert np.isfinite(losses).all()
    first = FIRST.get(name, 0)
    assert np.mean(losses[-5:]) < np.mean(losses[first : first + 5])

    assert checkpoint.load(parts / "run")["step"] == 8
    pretrain(config_file.load(configuration(name, scenes, parts)), resume=True)
    assert curve(parts) == losses
    one, other = (checkpoint.load(out / "run")["method"] for out in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert min(curve(whole, "embedding_std")) > Collapse.least_spread
    assert min(curve(whole, "embedding_rank")) > Collapse.least_rank
