"""The loop as a whole, on generated scenes: runs, is killed, resumes, spreads over processes, is guided."""

from __future__ import annotations

import html
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import noise_images
from kills import runs_that_survive
from PIL import Image
from runs import curve, once, scenes_in, signalled, write_config

from dali_views import SampleIndex
from dali_views.system import progress
from trainers import cli
from trainers.config import ContrastiveCrop
from trainers.config import file as config_file
from trainers.engine import checkpoint
from trainers.guides.guide import boxes_due, outlook
from trainers.pretrain import pretrain


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return scenes_in(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of nine steps that nothing happened to."""

    def make(folder: Path) -> None:
        file = write_config(folder, scenes_in(folder / "scenes"), run={"evaluate_every": 3})
        assert cli.main(["pretrain", str(file)]) == 0

    return once(tmp_path_factory, "undisturbed", make)


def test_a_run_leaves_curves_a_picture_its_configuration_and_a_finished_checkpoint(undisturbed):
    run = undisturbed / "run"
    steps, losses = zip(*curve(undisturbed), strict=True)
    assert steps == tuple(range(1, 10))
    assert np.isfinite(losses).all()
    assert np.asarray(Image.open(run / "pictures" / "epoch-0003.png").convert("RGB")).std() > 10
    assert list((run / "tensorboard").iterdir())
    resolved = config_file.load(run / "config.yaml")
    assert resolved == config_file.load(undisturbed / "config.yaml")
    saved = checkpoint.load(run)
    assert saved["step"] == 9
    assert config_file.parse(saved["config"]) == resolved
    # The guide has written after epochs 1 and 2 of 3; the last epoch has no next one to guide.
    assert (saved["regions"]["writes"] == 2).all()
    assert (saved["regions"]["written_epoch"] == 1).all()
    boxes = saved["regions"]["boxes"][:, 0]
    assert ((boxes[:, 2:] - boxes[:, :2]).prod(1) < 1).any()


@pytest.mark.slow
def test_a_run_killed_at_random_instants_ends_with_checkpoint_and_curve_of_one_never_killed(tmp_path):
    for _, folder, wrong in runs_that_survive(tmp_path, kills=2, seed=0, epochs=4):
        assert not wrong
        assert not (folder / "run" / "pictures").exists()  # evaluate_every is 0: never
        assert curve(folder) == curve(tmp_path / "undisturbed")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_the_run(scenes, tmp_path, capsys, number, code):
    file = write_config(tmp_path, scenes, run={"epochs": 500, "checkpoint_every": 0})
    with signalled(number, tmp_path / "run", 4):
        assert cli.main(["pretrain", str(file)]) == code
    assert "and saved; --resume continues it" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "run")["step"] == curve(tmp_path)[-1][0] >= 4


def test_an_existing_run_is_neither_overwritten_nor_continued_with_another_configuration(
    undisturbed, tmp_path, capsys
):
    run = shutil.copytree(undisturbed / "run", tmp_path / "run")
    words = ["pretrain", str(undisturbed / "config.yaml"), f"run.out={run}"]
    assert cli.main(words) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*words, "--resume", "optim.lr=0.2", "method.temperature=0.3"]) == 2
    told = "begun with method.temperature 0.2 and not 0.3, optim.lr 0.1 and not 0.2; continue it with these"
    assert told in capsys.readouterr().err
    # These train nothing else.
    free = ["localise.map=principal", "data.cache_dir=elsewhere", "data.cache_gb=7"]
    assert cli.main([*words, "--resume", *free]) == 0
    assert config_file.load(run / "config.yaml").data.cache_gb == 7


def test_boxes_are_updated_on_the_published_schedule():
    for epochs, warmup, interval, published in ((500, 100, 100, [100, 200, 300, 400]), (10, 0, 5, [5])):
        how = ContrastiveCrop(warmup=warmup, interval=interval)
        assert [n for n in range(1, epochs + 1) if boxes_due(n, epochs, how)] == published


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([], "contrastive crops in the boxes of contrastive_crop after epoch 1 of 3; random until then"),
        (["guide.warmup=2", "guide.interval=3"], "writes no boxes in 3 epochs: all crops stay random"),
        (["guide={name: none}"], "guide.name none writes no boxes: all crops stay random"),
        (["guide={name: simccrop}"], "contrastive crops in the boxes of simccrop from the start"),
        (["guide={name: none}", "views.crop=random"], None),
        (
            ["guide={name: simccrop}", "views.crop=random", "views.second_crop=inside"],
            "inside crops in the boxes",
        ),
    ],
)
def test_a_start_tells_when_crops_will_follow_boxes(scenes, tmp_path, changes, told):
    config = config_file.load(write_config(tmp_path, scenes), changes)
    assert told in outlook(config) if told else outlook(config) == ""


def test_views_that_a_method_does_not_compare_are_told_before_any_image_is_looked_for(tmp_path, capsys):
    file = write_config(tmp_path, {"kind": "folder", "path": str(tmp_path / "nowhere")})
    for change, told in (("dino", "MoCo compares 2 views per sample, not 10"), ("moco", "views.name 'moco'")):
        assert cli.main(["pretrain", str(file), f"views.name={change}"]) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("steps", "rates", "told"),
    [
        (None, {"lr": 1e20}, "the loss is .* at step 3; lower optim.lr"),
        # The loss of a step is of the weights before it: the last one says nothing of what is saved.
        (1, {"lr": 1e30, "weight_decay": 1e30}, r"is not finite after step 1; lower optim\.lr"),
    ],
)
def test_a_run_that_diverges_between_two_lines_of_its_log_leaves_no_checkpoint_of_it(
    scenes, tmp_path, steps, rates, told
):
    run = {"log_every": 1000, "checkpoint_every": 0, "max_steps": steps}
    file = write_config(tmp_path, scenes, run=run, optim={"name": "sgd", "batch": 16, **rates})
    with pytest.raises(FloatingPointError, match=told):
        pretrain(config_file.load(file))
    assert not list((tmp_path / "run").glob("*.pt"))


def test_a_run_is_continued_by_its_folder_and_a_refusal_tells_both_values(
    scenes, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    file, run = write_config(tmp_path, scenes), str(tmp_path / "run")
    assert cli.main(["pretrain", str(file), "run.max_steps=1"]) == 0
    captured = capsys.readouterr()
    assert "stopped after 1 step and saved; --resume continues it" in captured.out
    assert re.search(r"^step 1 of 1, (.*, )?0:\d\d:\d\d so far, 0:00:00 left$", captured.err, re.MULTILINE)
    assert "\r" not in captured.err, "no bar in a log"
    assert cli.main(["pretrain", run]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert cli.main(["pretrain", run, "--resume", "optim.lr=0.3"]) == 2
    assert "was begun with optim.lr 0.1 and not 0.3; continue it with" in capsys.readouterr().err
    assert cli.main(["pretrain", run, "--resume", "run.max_steps=2"]) == 0
    assert cli.main(["pretrain", f"{run}/last.pt", "--resume", "run.max_steps=null"]) == 0
    assert "finished after 9 steps" in capsys.readouterr().out


def test_a_run_may_be_continued_in_another_precision(scenes, tmp_path):
    file = write_config(tmp_path, scenes, guide={"name": "none"})
    for steps, precision in ((1, "off"), (2, "fp16"), (3, "off")):
        config = config_file.load(file, [f"run.max_steps={steps}", f"run.amp={precision}"])
        assert pretrain(config, resume=True).step == steps


def test_a_checkpoint_that_contradicts_its_run_ends_with_a_sentence_and_stays(scenes, tmp_path, capsys):
    file = write_config(tmp_path, scenes, run={"max_steps": 2})
    assert cli.main(["pretrain", str(file)]) == 0
    run = tmp_path / "run"
    saved = checkpoint.load(run)
    for part, value, words in (
        ("step", -7, "step = -7, not an integer from 0"),
        ("step", 10**12, "step = 1000000000000, not an integer from 0"),
        ("step", 1, "step = 1, but its loader has come to 2"),
        ("loader", {**saved["loader"], "epoch": 3}, "step = 2, but its loader has come to 11"),
        ("loader", {**saved["loader"], "position": "2"}, "loader.position = '2', not an integer"),
        ("config", 5, "config = 5, not text"),
        ("guide", {"passes": 1.5}, "guide.passes = 1.5, not an integer"),
        ("method", {name: weight.half() for name, weight in saved["method"].items()}, "float16 of shape"),
    ):
        checkpoint.save(run, {**saved, part: value})
        whole, _ = (run / checkpoint.LAST).read_bytes(), capsys.readouterr()
        assert cli.main(["pretrain", str(file), "--resume", "run.max_steps=3"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert words in line
        assert "; " in line, "a remedy follows"
        assert (run / checkpoint.LAST).read_bytes() == whole
    assert cli.main(["export", str(run), str(tmp_path / "encoder.safetensors")]) == 2
    assert "float16 of shape" in capsys.readouterr().err


def test_stochastic_depth_draws_on_after_a_resume_as_if_nothing_had_happened(scenes, tmp_path):
    losses = {}
    for name, parts in {"whole": [4], "halves": [2, 4]}.items():
        for steps in parts:
            run = {"checkpoint_every": 0, "max_steps": steps}
            file = write_config(tmp_path / name, scenes, run=run, model={"backbone": "efficientnet_b0"},
                                views={"size": 32, "blur": 0}, guide={"name": "none"})  # fmt: skip
            pretrain(config_file.load(file), resume=True)
        losses[name] = curve(tmp_path / name)
    assert len(losses["whole"]) == 4
    assert losses["halves"] == losses["whole"]


def test_files_that_cannot_be_used_are_named_with_the_reason_and_nothing_else_is_lost(tmp_path, capsys):
    folder = noise_images(tmp_path / "odd", 20)
    (folder / "text.jpg").write_text("this is no image\n")
    whole = (folder / "0000.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    left_out = SampleIndex.from_folder(folder, cache=False, progress=False).left_out
    assert {Path(item.path).name for item in left_out} == {"text.jpg", "truncated.jpg"}
    data = {"kind": "folder", "path": str(folder)}
    pretrain(config_file.load(write_config(tmp_path, data, run={"epochs": 1}, optim={"lr": 0.1, "batch": 4})))
    streams, page = capsys.readouterr(), html.unescape((tmp_path / "run" / "report.html").read_text())
    assert len(curve(tmp_path)) == 20 // 4
    assert "left out: 2<" in page
    for item in left_out:
        for words in (Path(item.path).name, item.reason):
            assert words in streams.out + streams.err
            assert words in page


def test_the_demo_measures_three_arms_beside_the_untrained_network_and_leaves_a_report(tmp_path, capsys):
    changes = ["run.epochs=3", "run.evaluate_every=3", "views.size=16", "optim.batch=16", "guide.size=64"]
    assert cli.main(["demo", str(tmp_path), "--scenes", "64", "--json", *changes]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert list(rows) == ["untrained", "random crops", "guided crops", "true crops"]
    assert found["gain"] == rows["guided crops"]["knn_top1"] - rows["random crops"]["knn_top1"]
    assert found["held_out"] == 21
    assert 0 < found["standard_error"] < 0.2
    assert Path(found["report"]).is_file()
    assert (tmp_path / "guided" / "pictures" / "epoch-0003.png").is_file()
    tables = [checkpoint.load(tmp_path / arm)["regions"] for arm in ("random", "guided", "true")]
    assert [bool(table["written"].any()) for table in tables] == [False, True, True]


def test_a_demo_that_cannot_run_makes_and_deletes_nothing(tmp_path, capsys):
    theirs = tmp_path / "random" / "theirs.txt"
    theirs.parent.mkdir()
    theirs.write_text("not of a demo")
    for change, told in (("guide.name=none", "writes no boxes"), ("run.epochs=3", "no run of a demo")):
        assert cli.main(["demo", str(tmp_path), change]) == 2
        assert told in capsys.readouterr().err
    assert theirs.exists()
    assert not (tmp_path / "scenes").exists()
