"""Steps taken in parts: as the whole batch would take them, on any number of processes, whenever killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import finish, start
from kills import differences
from networks import small_method, views_for, without_batch_norm
from runs import curve, lines_of, scenes_in, weights, write_config
from torch import nn
from torch._dynamo.testing import CompileCounter

from trainers import pretrain as loop
from trainers.config import ConfigError
from trainers.config import file as config_file
from trainers.engine import checkpoint, ranks
from trainers.methods import Method, method_of

# Nothing in these depends on the other images of a batch, but for what `ALONE` names.
METHODS: dict[str, dict[str, Any]] = {
    "byol": {"hidden_dim": 16, "output_dim": 8},
    "simsiam": {"hidden_dim": 16, "output_dim": 8, "predictor_dim": 4},
    "moco": {"hidden_dim": 0, "output_dim": 8, "queue": 80, "symmetric": True},
    "dino": {"hidden_dim": 16, "bottleneck_dim": 8, "output_dim": 24, "freeze_last_layer": 0},
    "scfs": {
        "hidden_dim": 16, "bottleneck_dim": 8, "output_dim": 24, "freeze_last_layer": 0,
        "layer_bottleneck": 4, "layer_hidden": 8, "layer_output": 5,
    },
    "simclr": {"hidden_dim": 16, "output_dim": 8, "bn": False},
    "lejepa": {"hidden_dim": 16, "output_dim": 8, "directions": 32},
}  # fmt: skip
ALONE = {"simclr": "the negatives of SimCLR", "lejepa": "the regularised embeddings of LeJEPA"}
MULTI_CROP = ("dino", "scfs", "lejepa")
STEPS, PARTS = 4, 5  # of 20 images; 48 images give two steps an epoch and leave 8 out


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return scenes_in(tmp_path_factory.mktemp("scenes"))


def exact(config: Any, own: None = None) -> Method:
    """The method of a configuration without batch norm, in float64: rounding does not hide a fault."""
    method = without_batch_norm(method_of(config)).double()

    def widen(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return [view.double() for view in args[0]], *args[1:]

    method.register_forward_pre_hook(widen)
    return method


def written(folder: Path, data: dict[str, str], name: str, parts: int, **changes: Any) -> Path:
    """The configuration of a run of `STEPS` steps of a method."""
    crops = {"name": "dino", "locals": 2, "local_size": 32} if name in MULTI_CROP else {}
    tree: dict[str, Any] = {
        "views": {"size": 32, "crop": "random", "blur": 0, **crops},
        "model": {"backbone": "test_convnext"},
        "method": {"name": name, **METHODS[name]},
        "guide": {"name": "none"},
        "run": {"epochs": 2, "checkpoint_every": 0},
        **changes,
    }
    clip = {"clip": 0.05} if name in MULTI_CROP else {}
    tree["optim"] = {"name": "sgd", "lr": 0.5, "batch": 20, **clip, **changes.get("optim", {})}
    tree["optim"]["accumulate"] = parts
    return write_config(folder, data, **tree)


def train(file: Path, *words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "method_of", exact)
        with ranks.together():
            loop.pretrain(config_file.load(file, words))
    return 0


@pytest.mark.parametrize("name", METHODS)
def test_a_step_in_parts_is_the_step_of_the_whole_batch_unless_the_loss_needs_all_of_it(
    scenes: dict[str, str], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, parts in (("whole", 1), ("parts", PARTS)):
        train(written(tmp_path / folder, scenes, name, parts))
    told = "are those of 4 images, one part of a step, not of its 20"
    printed = capsys.readouterr().out
    assert f"{ALONE[name]} {told}" in printed if name in ALONE else told not in printed
    losses, in_parts = (torch.tensor(curve(tmp_path / each)) for each in ("whole", "parts"))
    assert losses[:, 0].tolist() == in_parts[:, 0].tolist() == [1, 2, 3, 4]
    if name in ALONE:
        assert not torch.allclose(losses, in_parts, atol=1e-3)
        return
    torch.testing.assert_close(in_parts, losses, atol=1e-6, rtol=1e-6)
    whole, trained = (weights(tmp_path / each) for each in ("whole", "parts"))
    # Symmetric MoCo's keys come part by part, each with both directions: the same ones in another order.
    queue = {each: state.pop("queue", torch.zeros(0, 1)) for each, state in (("w", whole), ("p", trained))}
    torch.testing.assert_close(*(each.sort(dim=0).values for each in queue.values()), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(trained, whole, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_two_processes_take_the_step_in_parts_that_one_takes_at_once(
    scenes: dict[str, str], tmp_path: Path
) -> None:
    for name in ("dino", "moco"):
        train(written(tmp_path / name / "one", scenes, name, 1))
        file = written(tmp_path / name / "two", scenes, name, PARTS)
        codes = finish(start(2, tmp_path / name, train, lambda rank, file=file: (file,)))  # type: ignore[misc]
        assert codes == [0, 0], (tmp_path / name / "0.log").read_text()
        one, two = (weights(tmp_path / name / each) for each in ("one", "two"))
        for state in (one, two):
            state.pop("queue", None)
        torch.testing.assert_close(two, one, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("precision", "within"), [("bf16", 2e-2), ("fp16", 5e-3)])
def test_half_precision_scales_and_clips_the_gradients_of_all_parts_once(
    scenes: dict[str, str], tmp_path: Path, precision: str, within: float
) -> None:
    run = {"epochs": 2, "checkpoint_every": 0, "amp": precision}
    for folder, parts in (("whole", 1), ("parts", PARTS)):
        loop.pretrain(config_file.load(written(tmp_path / folder, scenes, "dino", parts, run=run)))
    losses, in_parts = (torch.tensor(curve(tmp_path / each)) for each in ("whole", "parts"))
    torch.testing.assert_close(in_parts, losses, atol=within, rtol=0)
    whole, trained = (weights(tmp_path / each) for each in ("whole", "parts"))
    torch.testing.assert_close(trained, whole, atol=within, rtol=0)


def test_parts_that_groups_of_batch_norm_do_not_divide_are_refused(
    scenes: dict[str, str], tmp_path: Path
) -> None:
    file = written(tmp_path, scenes, "moco", PARTS)
    assert config_file.load(file, ["method.split_bn=4"]).optim.accumulate == PARTS
    with pytest.raises(
        ConfigError, match=r"split_bn 5 does not divide optim\.batch 20 / optim\.accumulate 5"
    ):
        config_file.load(file, ["method.split_bn=5"])


class Killed(BaseException):
    """In place of a signal that cannot be caught: nothing of the process writes anything after it."""


@contextmanager
def killed_in_part(number: int) -> Iterator[None]:
    """Ends the loop at the beginning of a part, counted over the run from 0."""
    seed_step = ranks.seed_step

    def seed_or_die(seed: int, step: int) -> None:
        if step == number:
            raise Killed
        seed_step(seed, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "seed_step", seed_or_die)
        yield


@pytest.mark.slow
def test_a_run_killed_between_two_parts_ends_with_the_checkpoint_of_one_never_killed(
    scenes: dict[str, str], tmp_path: Path
) -> None:
    """With dropout, a queue, maps of the views of all parts, and semantic pairs beside them."""
    changes: dict[str, Any] = {
        "model": {"backbone": "efficientnet_b0"},
        "views": {"size": 32, "crop": "contrastive", "blur": 0, "partner": "add"},
        "guide": {
            "name": "semantic_pairs", "encoder": None, "control": "random",
            "boxes": {"name": "online_crop", "warmup": 1, "interval": 1},
        },
        "run": {"epochs": 2, "checkpoint_every": 1},
        "optim": {"batch": 16},
    }  # fmt: skip
    saved = {}
    for name, kills in (("undisturbed", ()), ("killed", (6, 17))):
        config = config_file.load(written(tmp_path / name, scenes, "moco", 4, **changes))
        for number in kills:
            with killed_in_part(number), pytest.raises(Killed):
                loop.pretrain(config, resume=True)
            assert checkpoint.load(tmp_path / name / "run")["step"] == number // 4
        assert loop.pretrain(config, resume=True).finished
        saved[name] = checkpoint.load(tmp_path / name / "run")
        # Every image of an epoch has been seen, whatever part it was in.
        assert not saved[name]["guide"]["boxes"]["maps"]["maps"].isnan().all((1, 2)).any()
    assert differences({**saved["killed"], "config": ""}, {**saved["undisturbed"], "config": ""}) == []
    assert curve(tmp_path / "killed") == curve(tmp_path / "undisturbed")
    assert lines_of(tmp_path / "killed" / "run", "history/events.jsonl")[0]["steps_per_epoch"] == 3


def test_compiled_methods_are_compiled_few_times_however_many_parts_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    for name in ("moco", "dino", "byol"):
        torch.compiler.reset()
        method, counter = small_method(name), CompileCounter()
        network = torch.compile(method, backend=counter)
        for part in range(12):
            network(views_for(name, 4, seed=part)).mean().backward()
        assert counter.frame_count <= 3
    torch.compiler.reset()
