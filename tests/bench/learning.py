"""What runs that learn look like, and runs that do not: the curves of docs/learning.md.

python tests/bench/learning.py runs/learning            # eleven runs of 640 steps, twelve minutes of one core
python tests/bench/learning.py runs/learning byol       # these alone; runs that have ended are not made again

Scenes with one object, views of 32 pixels, timm's `test_resnet`; no run differs from another by more than its
line below. Writes results/cpu_learning_scenes.csv from all runs that lie in the folder.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from torch import Tensor

from dali_views.tools.scenes import make_scenes
from trainers import config as cfg
from trainers.config import file as config_file
from trainers.encoders.backbones import Backbone
from trainers.methods.simsiam import SimSiam
from trainers.pretrain import pretrain

RESULTS = Path(__file__).resolve().parent / "results" / "cpu_learning_scenes.csv"
SCENES = 2560
COLUMNS = ("loss", "embedding_std", "embedding_rank", "knn_top1")
BASE = """
run: {out: runs/learning, epochs: 20, evaluate_every: 2, log_every: 10, device: cpu, threads: 1}
data: {kind: coco, path: scenes, val_share: 0.2}
views: {name: moco_v2, size: 32, blur: 0}
model: {backbone: test_resnet}
method: {name: simclr}
optim: {name: adamw, lr: 1e-3, lr_scaling: false, batch: 64, weight_decay: 1e-4, warmup_epochs: 0.5}
"""
_BYOL = "method={name: byol, hidden_dim: 512, output_dim: 128, momentum: 0.99}"
_SIMSIAM = "{hidden_dim: 512, output_dim: 512, predictor_dim: 128}"
_DINO = [
    "views={name: dino, size: 32, blur: 0, scale: [0.25, 1]}",
    "views.locals=2", "views.local_size=16", "views.local_scale=[0.1, 0.3]",
    "method={name: dino, hidden_dim: 512, bottleneck_dim: 128, output_dim: 1024, bn: true, momentum: 0.99}",
    "optim.clip=3.0",
]  # fmt: skip
ARMS = {
    "simclr": [],
    "moco": [
        "method={name: moco, temperature: 0.1, hidden_dim: 512, bn: true, queue: 1024, momentum: 0.99}",
        "method.split_bn=4",
    ],
    "byol": [_BYOL],
    "simsiam": [f"method={_SIMSIAM}", "method.name=simsiam"],
    "dino": _DINO,
    "dino_no_centre": [*_DINO, "method.centre_momentum=1.0"],
    "simsiam_no_stop": [f"method={{name: own, options: {_SIMSIAM}}}"],
    "simclr_lr_100": ["optim.lr=0.1"],
    "byol_lr_100": [_BYOL, "optim.lr=0.1"],
    "simclr_lr_0001": ["optim.lr=1e-6"],
    "byol_still": [_BYOL, "method.momentum=1.0"],
}  # fmt: skip


class NoStop(SimSiam):
    """SimSiam whose target gets a gradient, too."""

    def __init__(self, backbone: Backbone, section: cfg.Own) -> None:
        super().__init__(backbone, cfg.SimSiam(**section.options))

    def target(self, z: Tensor) -> Tensor:
        return z


def train(out: Path, arm: str) -> None:
    images, instances = out / "scenes" / "images", out / "scenes" / "instances.json"
    if not instances.is_file():
        make_scenes(out / "scenes", SCENES, size=48, objects=(1, 1))
    base = out / "base.yaml"
    base.write_text(BASE)
    paths = [f"run.out={out / arm}", f"data.path={images}", f"data.instances={instances}"]
    config = config_file.load(base, [*paths, *ARMS[arm]])
    pretrain(config, resume=True, own_method=NoStop if isinstance(config.method, cfg.Own) else None)


def collected(out: Path) -> list[dict[str, str]]:
    """A line for every logged step and every evaluation of every run in the folder."""
    rows = []
    for arm in ARMS:
        metrics = out / arm / "metrics.jsonl"
        for line in map(json.loads, metrics.read_text().splitlines() if metrics.is_file() else ()):
            found = {name: f"{line[name]:.4g}" for name in COLUMNS if name in line}
            if found:
                rows.append({"run": arm, "step": str(line["step"]), **found})
    return rows


def main(out: Path, arms: list[str]) -> None:
    for arm in arms or ARMS:
        train(out, arm)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "step", *COLUMNS])
        writer.writeheader()
        writer.writerows(collected(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
