"""Spread and rank tell a method without its protection from collapse from the intact one."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import pytest
import torch
from networks import tiny_backbone
from runs import ROOT
from torch import nn

from trainers import config as cfg
from trainers.config import file as config_file
from trainers.engine.optim import Clock
from trainers.methods import Method, build_method, method_of
from trainers.methods.simsiam import SimSiam
from trainers.report.report import Collapse, effective_rank, spread


def learn(method: Method, steps: int, rate: float, warmup: int) -> dict[str, float]:
    """Spread and rank after some steps on 32 images, each seen through noise twice."""
    generator = torch.Generator().manual_seed(0)
    images = nn.functional.interpolate(torch.randn(32, 3, 4, 4, generator=generator), size=8)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / warmup)
        clock = Clock(step, steps, 1)
        method.before_step(clock)
        optimizer.zero_grad()
        views = [images + 0.3 * torch.randn(images.shape, generator=generator) for _ in range(2)]
        method(views).mean().backward()
        method.after_backward(clock)
        optimizer.step()
        method.after_step(clock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Collapse().measure(method.embedding)


def simsiam(monkeypatch: pytest.MonkeyPatch, stop: bool) -> dict[str, float]:
    backbone = tiny_backbone(norm=True)
    torch.manual_seed(1)
    method = SimSiam(backbone, cfg.SimSiam(hidden_dim=32, output_dim=16, predictor_dim=8))
    if not stop:
        monkeypatch.setattr(method, "target", lambda z: z)
    # The last norm would stretch what has collapsed to the usual length again.
    method.projector[-1] = nn.Identity()
    return learn(method, 100, rate=0.2, warmup=1)


def dino(centre_momentum: float) -> dict[str, float]:
    backbone = tiny_backbone(norm=True)
    torch.manual_seed(1)
    keys = {"hidden_dim": 256, "bottleneck_dim": 32, "output_dim": 32, "momentum": 0.9}
    method = build_method(cfg.DINO(**keys, freeze_last_layer=0, centre_momentum=centre_momentum), backbone)
    with torch.no_grad():  # DINO's initial weights are made for heads ten times as wide
        for parameter in [*method.head.mlp.parameters(), *method.teacher_head.mlp.parameters()]:
            parameter.mul_(3)
    return learn(method, 200, rate=0.02, warmup=100)


def test_simsiam_without_stop_gradient_and_dino_without_centring_lose_spread_and_rank(monkeypatch) -> None:
    intact, robbed = simsiam(monkeypatch, stop=True), simsiam(monkeypatch, stop=False)
    assert intact["embedding_std"] > 0.9
    assert robbed["embedding_std"] < 0.3
    assert robbed["embedding_rank"] < intact["embedding_rank"] / 2
    intact, robbed = dino(0.9), dino(1.0)
    assert intact["embedding_std"] > 0.5
    assert intact["embedding_rank"] > 3
    assert robbed["embedding_std"] < Collapse.least_spread
    assert robbed["embedding_rank"] < Collapse.least_rank


def test_spread_and_rank_of_known_embeddings() -> None:
    torch.manual_seed(0)
    assert spread(torch.randn(4096, 64)) == pytest.approx(1, abs=0.01)
    assert spread(torch.ones(8, 64) * torch.rand(8, 1)) == pytest.approx(0, abs=1e-6)
    assert effective_rank(torch.eye(8, 100)) == pytest.approx(8)
    assert effective_rank(torch.eye(100, 8)) == pytest.approx(8)  # through the other product
    assert effective_rank(torch.ones(8, 5)) == pytest.approx(1, abs=1e-5)
    rows = torch.randn(12, 7)
    values = torch.linalg.svdvals(nn.functional.normalize(rows, dim=1))
    entropy = torch.special.entr(values / values.sum()).sum()
    assert effective_rank(rows) == pytest.approx(float(entropy.exp()), rel=1e-5)


def test_a_collapse_is_warned_of_once() -> None:
    watch = Collapse()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for embedding in (torch.eye(8), torch.ones(8, 4), torch.ones(8, 4)):
            watch.measure(embedding)
    assert ["have collapsed" in str(each.message) for each in warned] == [True]


def test_recorded_runs_that_do_not_learn_lose_rank_and_kNN_does_not_always_tell() -> None:
    with (ROOT / "tests/bench/results/cpu_learning_scenes.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))

    def values(run: str, column: str) -> list[float]:
        return [float(line[column]) for line in lines if line["run"] == run and line[column]]

    pairs = {
        "simsiam_no_stop": "simsiam",
        "dino_no_centre": "dino",
        "simclr_lr_100": "simclr",
        "byol_lr_100": "byol",
    }
    for ill, healthy in pairs.items():
        assert values(ill, "embedding_rank")[-1] < values(healthy, "embedding_rank")[-1] / 3
        assert values(healthy, "knn_top1")[-1] > values(healthy, "knn_top1")[0] + 0.1
    for ill in ("simsiam_no_stop", "dino_no_centre", "byol_lr_100"):
        assert values(ill, "loss")[-1] < values(pairs[ill], "loss")[-1]
    assert abs(values("dino_no_centre", "knn_top1")[-1] - values("dino", "knn_top1")[-1]) < 0.05


def test_the_recorded_runs_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "bench")
    import learning

    (tmp_path / "base.yaml").write_text(learning.BASE)
    for changes in learning.ARMS.values():
        config = config_file.load(tmp_path / "base.yaml", ["data.instances=boxes.json", *changes])
        if isinstance(config.method, cfg.Own):
            assert isinstance(method_of(config, learning.NoStop), SimSiam)
