"""`detect`: detectors on encoders of runs and files, trained through the same loader, stopped and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from by_hand import finish, start
from runs import lines_of, scenes_in, write_config

from dali_views import SampleIndex
from trainers import cli
from trainers import config as cfg
from trainers.detect.model import Detector
from trainers.detect.targets import loader_to_train, views_of
from trainers.detect.truth import read_truth
from trainers.encoders.backbones import build_backbone
from trainers.engine import checkpoint
from trainers.engine.setting import join

SMALL = [
    "detect.size=48", "detect.longest=64", "detect.shorts=[32,48]", "detect.anchors=[8,16,24,32,48]",
    "detect.width=8", "detect.rois=16", "detect.proposals=32", "detect.batch=4", "detect.steps=18",
    "detect.warmup=2", "detect.drops=[16]", "data.val_share=0.1", "run.checkpoint_every=1", "run.log_every=1",
]  # fmt: skip
CONFIG = cfg.check({"run": {"out": "-", "device": "cpu"}, "data": {"kind": "coco", "path": "-"}}, "")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on 64 scenes, with its encoder exported beside it."""
    folder = tmp_path_factory.mktemp("run")
    plain = {"guide": {"name": "none"}, "views": {"size": 16, "blur": 0}}
    file = write_config(folder, scenes_in(folder), run={"epochs": 1}, **plain)
    assert cli.main(["pretrain", str(file)]) == 0
    assert cli.main(["export", str(folder / "run"), str(folder / "encoder.safetensors")]) == 0
    return folder / "run"


def words(run: Path, *more: str) -> list[str]:
    data = [f"data.path={run.parent / 'images'}", f"data.instances={run.parent / 'instances.json'}"]
    return ["detect", str(run), *data, *SMALL, *more]


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines_of(folder) if "loss" in line]


@pytest.fixture(scope="module")
def whole(run: Path) -> Path:
    """The folder of an undisturbed detector."""
    assert cli.main(words(run)) == 0
    return run / "detect"


def test_a_detector_leaves_scores_curve_checkpoint_and_page(run, whole):
    found = lines_of(run, "evaluations.jsonl")[0]
    assert found["evaluation"] == found["name"] == "detect"
    names = {f"{kind}_ap{end}" for kind in ("box", "mask") for end in ("", "50", "75")}
    assert all(0 <= found[name] <= 1 for name in names)
    assert [step for step, _ in losses(whole)] == list(range(1, 19)), "58 images: 14 steps an epoch"
    assert checkpoint.load(whole)["step"] == 18
    assert "Average precision" in (whole / "report.html").read_text()
    assert "finished after 18 steps" in (whole / "report.html").read_text()


@pytest.mark.parametrize("stop", [5, 14])
def test_stopped_within_an_epoch_or_at_its_end_and_resumed_gives_the_same_curve(run, whole, stop, capsys):
    name = ["--name", f"stopped-{stop}"]
    assert cli.main(words(run, *name, f"run.max_steps={stop}")) == 0
    assert f"stopped and saved after {stop} steps" in capsys.readouterr().out
    assert cli.main(words(run, *name)) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert cli.main(words(run, *name, "detect.lr=0.5", "--resume")) == 2
    assert "begun with another detect.lr" in capsys.readouterr().err
    assert cli.main(words(run, *name, "--resume")) == 0
    assert losses(run / name[1]) == losses(whole)
    last = [line for line in lines_of(run, "evaluations.jsonl") if line["name"] in ("detect", name[1])]
    assert last[0]["box_ap"] == last[-1]["box_ap"]


def test_an_exported_encoder_gives_the_same_detector_and_an_untrained_one_another(run, whole, capsys):
    out = run.parent / "from-file"
    exported = words(run.parent / "encoder.safetensors", f"run.out={out}", "run.device=cpu", "run.threads=1")
    exported[2:4] = words(run)[2:4]
    assert cli.main(exported) == 0
    assert losses(out / "detect") == losses(whole)
    assert cli.main(words(run, "--encoder", "untrained", "detect.steps=2")) == 0
    assert losses(run / "detect-untrained") != losses(whole)[:2]


def test_a_broken_image_costs_that_image(run, tmp_path, capsys):
    """Found by the index, or by the decoder after the index was made."""
    shutil.copytree(run.parent / "images", tmp_path / "images")
    files = [str(run.parent / "instances.json")]
    truth = read_truth(SampleIndex.from_folder(tmp_path / "images", cache=False, progress=False), files)
    broken = tmp_path / "images" / "000003.jpg"
    broken.write_bytes(broken.read_bytes()[:700])  # the header is whole
    section = cfg.Detect(size=48, longest=64, batch=4)
    loader = loader_to_train(join(CONFIG), CONFIG.views, section, truth.index, 1)
    with pytest.warns(UserWarning, match="Left out while running: .*000003.jpg"):
        rows = [row for batch in loader for row, _, _ in views_of(batch)]
    assert len(rows) == 64
    assert 3 not in rows
    assert cli.main(words(run, "--name", "broken", f"data.path={tmp_path / 'images'}")) == 0
    assert "000003.jpg" in capsys.readouterr().out
    assert lines_of(run / "broken")[-1]["step"] == 18


def detector(section: cfg.Detect, backbone: str = "resnet10", masks: bool = False) -> Detector:
    return Detector(build_backbone(backbone), 3, section, masks, join(CONFIG))


def test_frozen_stages_and_norms_do_not_change():
    section = cfg.Detect(size=64, longest=64, width=8, rois=16, proposals=32, frozen_stages=1)
    network = detector(section, masks=True)
    body = network.network.backbone.body
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, 64, 64, dtype=torch.uint8)
    network([torch.rand(3, 64, 64)] * 2, [target] * 2).backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad), "ranks wait for each"
    optimizer.step()
    after = body.state_dict()
    changed = {name.split(".")[0] for name in after if (after[name] != before[name]).any()}
    assert changed == {"layer2", "layer3", "layer4"}
    fixed = detector(section.model_copy(update={"norm": "frozen", "frozen_stages": 0}))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fixed.modules())


def test_mistakes_are_one_sentence(run, tmp_path, capsys):
    with pytest.raises(ValueError, match="has no stages of falling resolution"):
        detector(cfg.Detect(), "test_vit")
    empty = tmp_path / "empty.json"
    content = json.loads((run.parent / "instances.json").read_text())
    empty.write_text(json.dumps({**content, "annotations": []}))
    for told, more in {
        "none of 58 images has a box": [f"data.instances={empty}"],
        "needs true boxes": ["data.instances=null"],
        "there is no file of annotations": ["detect.instances=[nothing.json]"],
        "does not divide": ["detect.batch=64"],
        "trained with another model.backbone": ["model.backbone=resnet18"],
        "has no true boxes; name their file by detect.val_instances": ["detect.val_path=elsewhere"],
        "detect.longest 40 is below": ["detect.longest=40"],
    }.items():
        assert cli.main(words(run, "--name", "wrong", *more)) == 2, told
        error = capsys.readouterr().err
        assert told in error or (told == "does not divide" and "do not fill" in error), error
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    assert cli.main(words(tmp_path / "x.safetensors")) == 2
    assert "export the encoder again" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_give_the_same_curve(run, tmp_path):
    def go(name: str, *more: str) -> list:
        return start(2, tmp_path / name, cli.main, lambda rank: [words(run, "--name", name, *more)])

    assert finish(go("pair"), 300) == [0, 0]
    lives = go("killed")
    until = time.monotonic() + 300
    while not (run / "killed" / "metrics.jsonl").exists() or len(losses(run / "killed")) < 6:
        assert time.monotonic() < until
        assert all(life.is_alive() for life in lives), (tmp_path / "killed" / "0.log").read_text()
        lives[0].join(0.05)
    for life in lives:
        os.kill(life.pid, signal.SIGKILL)
        life.join()
    assert finish(go("killed", "--resume"), 300) == [0, 0]
    assert losses(run / "killed") == losses(run / "pair")
    assert [step for step, _ in losses(run / "pair")] == list(range(1, 19))
    scores = {line["name"]: line["box_ap"] for line in lines_of(run, "evaluations.jsonl")}
    assert scores["killed"] == scores["pair"]
