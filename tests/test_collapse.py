"""A method robbed of what keeps it from collapsing is told from the intact one by spread and rank."""

from __future__ import annotations

import warnings

import pytest
import torch
from networks import tiny_backbone
from torch import Tensor, nn

from trainers import config as cfg
from trainers.engine.schedules import Clock
from trainers.methods import Method, build_method
from trainers.methods.dino import DINO
from trainers.methods.simsiam import SimSiam
from trainers.report.measures import Collapse, effective_rank, spread


def learn(method: Method, steps: int, rate: float, warmup: int) -> dict[str, float]:
    """Spread and rank after some steps on 32 images, each seen through noise twice."""
    generator = torch.Generator().manual_seed(0)
    images = nn.functional.interpolate(torch.randn(32, 3, 4, 4, generator=generator), size=8)
    weights = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=rate, momentum=0.9)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / warmup)
        clock = Clock(step, steps, 1)
        method.before_step(clock)
        views = [images + 0.3 * torch.randn(images.shape, generator=generator) for _ in range(2)]
        optimizer.zero_grad()
        method(views).mean().backward()
        method.after_backward(clock)
        optimizer.step()
        method.after_step(clock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Collapse().measure(method.embedding)


class WithoutStopGradient(SimSiam):
    def target(self, z: Tensor) -> Tensor:
        return z


def simsiam(kind: type[SimSiam]) -> SimSiam:
    backbone = tiny_backbone(norm=True)
    torch.manual_seed(1)
    method = kind(backbone, cfg.SimSiam(hidden_dim=32, output_dim=16, predictor_dim=8))
    # The last norm would stretch what has collapsed to the usual length again.
    method.projector[-1] = nn.Identity()
    return method


def dino(centre_momentum: float) -> DINO:
    backbone = tiny_backbone(norm=True)
    torch.manual_seed(1)
    keys = {"hidden_dim": 256, "bottleneck_dim": 32, "output_dim": 32, "momentum": 0.9}
    method = build_method(cfg.DINO(**keys, freeze_last_layer=0, centre_momentum=centre_momentum), backbone)
    assert isinstance(method, DINO)
    with torch.no_grad():  # DINO's initial weights are made for heads ten times as wide
        for head in (method.head, method.teacher_head):
            for parameter in head.mlp.parameters():
                parameter.mul_(3)
    return method


def test_simsiam_without_stop_gradient_loses_spread_and_rank() -> None:
    intact = learn(simsiam(SimSiam), 100, rate=0.2, warmup=1)
    robbed = learn(simsiam(WithoutStopGradient), 100, rate=0.2, warmup=1)
    assert intact["embedding_std"] > 0.9
    assert robbed["embedding_std"] < 0.3
    assert robbed["embedding_rank"] < intact["embedding_rank"] / 2


def test_dino_without_centring_gives_all_images_to_one_prototype() -> None:
    intact = learn(dino(0.9), 200, rate=0.02, warmup=100)
    robbed = learn(dino(1.0), 200, rate=0.02, warmup=100)
    assert intact["embedding_std"] > 0.5
    assert intact["embedding_rank"] > 3
    assert robbed["embedding_std"] < Collapse.least_spread
    assert robbed["embedding_rank"] < Collapse.least_rank


def test_spread_is_one_in_all_directions_alike_and_nothing_if_all_are_equal() -> None:
    torch.manual_seed(0)
    assert spread(torch.randn(4096, 64)) == pytest.approx(1, abs=0.01)
    assert spread(torch.eye(64)) == pytest.approx(1, abs=0.01)
    assert spread(torch.ones(8, 64) * torch.rand(8, 1)) == pytest.approx(0, abs=1e-6)


def test_effective_rank_counts_directions_and_is_the_same_through_either_product() -> None:
    torch.manual_seed(0)
    assert effective_rank(torch.eye(8, 100)) == pytest.approx(8)
    assert effective_rank(torch.eye(100, 8)) == pytest.approx(8)
    assert effective_rank(torch.ones(8, 5)) == pytest.approx(1, abs=1e-5)
    rows = torch.randn(12, 7)
    values = torch.linalg.svdvals(nn.functional.normalize(rows, dim=1))
    shares = values / values.sum()
    expected = float(torch.exp(-(shares * shares.log()).sum()))
    assert effective_rank(rows) == pytest.approx(expected, rel=1e-5)


def test_a_collapse_is_warned_of_once() -> None:
    watch = Collapse()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.measure(torch.eye(8))
    with pytest.warns(UserWarning, match="have collapsed"):
        watch.measure(torch.ones(8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.measure(torch.ones(8, 4))
