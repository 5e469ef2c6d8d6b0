"""The classifier beside pretraining: it changes nothing, sees first views, learns alike on any ranks."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import finish, start
from kills import differences
from networks import SMALL, small_method, views_for, without_batch_norm
from runs import lines_of, scenes_in, write_config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dali_views import Batch, SampleIndex
from trainers.config import Config
from trainers.config import file as config_file
from trainers.data import DataSets
from trainers.engine import checkpoint, ranks
from trainers.engine.optim import Clock
from trainers.engine.setting import join
from trainers.evaluate.online_probe import OnlineProbe
from trainers.pretrain import pretrain

CLASSES = 3


def images(labels: list[int]) -> SampleIndex:
    return SampleIndex.from_arrays(np.zeros((len(labels), 8, 8, 3), np.uint8), labels, list("abc"))


def probe_of(encoder: nn.Module, labels: list[int]) -> OnlineProbe:
    index = images(labels)
    run = {"out": "run", "device": "cpu"}
    config = Config.model_validate({"run": run, "data": {"kind": "folder", "path": "photos"}})
    return OnlineProbe(join(config), encoder, DataSets(index, index, index))  # type: ignore[arg-type]


def batch_of(views: list[Tensor], labels: Tensor) -> Batch:
    """A batch of which nothing else is looked at."""
    rest = {field.name: torch.ones(len(labels)) for field in fields(Batch)}
    return Batch(**{**rest, "views": views, "label": labels})  # type: ignore[arg-type]


class Passes(nn.Module):
    """An encoder whose features are given."""

    dim = 5

    def forward(self, features: Tensor) -> Tensor:
        return features


def taught(rows: slice = slice(None), steps: int = 40) -> tuple[OnlineProbe, dict[str, float]]:
    """A probe after some steps of 32 samples, every fourth of which has no label; and what it read."""
    draw = torch.Generator().manual_seed(0)
    half, labels = torch.randn(16, 5, generator=draw), torch.arange(32) % 16 % CLASSES
    # Both halves have the same statistics, so batch norm of a half is that of the whole.
    features, probe = torch.cat([half, half]), probe_of(encoder := Passes(), [0, 1, 2])
    features = features + 2 * F.one_hot(labels, 5)
    labels[::4] = -1
    labels[19:] = -1  # the second half has few, and not as many of each class
    for step in range(steps):
        for part in (slice(None, None, 2), slice(1, None, 2)):
            encoder(features[rows][part])
            probe.after_batch(batch_of([features[rows][part]], labels[rows][part]))
        probe.after_step(Clock(step, steps, 1))
    return probe, probe.read()


def plain(state: Any) -> Any:
    return state["linear"], state["optimizer"]["state"]


def scored(probe: OnlineProbe, rank: int = 0, world: int = 1) -> dict[str, float]:
    """On unlike views: a tenth as long, and far from the training views. Unlabelled ones are far away."""
    draw, labels = torch.Generator().manual_seed(1), torch.arange(60) % CLASSES
    features = 0.1 * (2 * F.one_hot(labels, 5) + torch.randn(60, 5, generator=draw)) + 5
    labels[::6] = -1
    features[::6] = -100
    part = features[rank::world], labels[rank::world]
    return probe.score(*part, *part)


def learn_on_one_rank(folder: str) -> int:
    ranks.init("cpu")
    with ranks.together():
        rank = ranks.rank()
        probe, read = taught(slice(16 * rank, 16 * rank + 16))
        assert isinstance(probe._network, DistributedDataParallel)
        torch.save([plain(probe.state_dict()), read, scored(probe, rank, 2)], f"{folder}/{rank}.pt")
    return 0


def test_it_learns_from_labelled_images_alone_and_two_ranks_learn_what_one_does(tmp_path: Path) -> None:
    alone, read = taught()
    assert 1 / CLASSES < read["online_top1"] < 1
    assert alone.read() == {}, "counted since the last reading"
    assert scored(alone)["online_test_top1"] > 0.6
    codes = finish(start(2, tmp_path, learn_on_one_rank, lambda rank: (str(tmp_path),)))
    assert codes == [0, 0], (tmp_path / "0.log").read_text()
    for state, told, score in (torch.load(tmp_path / f"{rank}.pt") for rank in range(2)):
        torch.testing.assert_close(state, plain(alone.state_dict()), atol=1e-5, rtol=1e-4)
        assert (told, score) == (pytest.approx(read), pytest.approx(scored(alone)))
    assert scored(probe_of(Passes(), [0, -1])) == {}, "not taught yet"
    with pytest.raises(ValueError, match="no training image has one"):
        probe_of(Passes(), [-1, -1])


@pytest.mark.parametrize("name", SMALL)
def test_it_sees_the_first_view_in_the_encoder_that_is_evaluated_and_evaluations_pass_it_by(
    name: str,
) -> None:
    method, labels = without_batch_norm(small_method(name)), torch.tensor([0, 1, 2, 1])
    encoder = copy.deepcopy(method.encoder)
    beside, directly = probe_of(method.encoder, [0, 1, 2]), probe_of(encoder, [0, 1, 2])
    for step in range(3):
        batch = batch_of(views_for(name, 4, seed=step), labels)
        method.eval()(batch.views)
        method.train()(batch.views)
        method(views_for(name, 4, seed=9))  # as added pairs
        encoder(batch.views[0])
        for probe in (beside, directly):
            probe.after_batch(batch)
            probe.after_step(Clock(step, 3, 1))
    torch.testing.assert_close(plain(beside.state_dict()), plain(directly.state_dict()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "views"),
    [
        ({"name": "moco", "queue": 64}, {}),
        ({"name": "dino", "output_dim": 64}, {"name": "dino", "locals": 1}),
    ],
)
def test_pretraining_is_bit_for_bit_the_same_with_it_and_it_goes_on_after_a_stop(
    method: dict[str, Any], views: dict[str, Any], tmp_path: Path
) -> None:
    """With stochastic depth, in parts; switched off and on, it begins anew."""
    data, saved = scenes_in(tmp_path / "scenes"), {}
    for name, online, stops in (("off", False, ()), ("on", True, ()), ("stopped", True, (2,))):
        run = {
            "epochs": 2,
            "evaluate_every": 2,
            "log_every": 2,
            "checkpoint_every": 0,
            "online_probe": online,
        }
        file = write_config(
            tmp_path / name, data, run=run, method=method, model={"backbone": "efficientnet_b0"},
            views={"size": 32, "blur": 0, "crop": "random", **({"local_size": 32} if views else {}), **views},
            guide={"name": "none"}, optim={"name": "sgd", "lr": 0.1, "batch": 16, "accumulate": 2},
        )  # fmt: skip
        for steps in (*stops, None):
            words = [] if steps is None else [f"run.max_steps={steps}"]
            result = pretrain(config_file.load(file, words), resume=True)
        saved[name] = {**checkpoint.load(tmp_path / name / "run"), "config": ""}
        lines = lines_of(tmp_path / name / "run")
        assert [line["step"] for line in lines if "online_top1" in line] == ([2, 4, 6] if online else [])
        assert "online_test_top1" not in result.scores.get("untrained", {})
        assert ("online_test_top1" in result.scores["epoch 2"]) == online
    assert differences(saved["on"], saved["stopped"]) == []
    probe = saved["on"].pop("online_probe")
    assert probe["linear"]["weight"].abs().max() > 0
    assert differences(saved["off"], saved["on"]) == []
    assert pretrain(
        config_file.load(tmp_path / "off" / "config.yaml", ["run.online_probe=true"]), True
    ).finished
