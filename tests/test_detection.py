"""`detect`: detectors on encoders of runs and files, trained through the same loader, stopped and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import finish, start
from fake_cuda import one_of
from runs import lines_of, scenes_in, write_config
from test_sync_batch_norm import KERNELS

from dali_views import SampleIndex
from trainers import cli
from trainers import config as cfg
from trainers.detect.model import Detector
from trainers.detect.targets import loader_to_train, views_of
from trainers.detect.truth import read_truth
from trainers.encoders.backbones import build_backbone
from trainers.engine import checkpoint, ranks
from trainers.engine.setting import join
from trainers.methods.networks import SyncBatchNorm, synced_batch_norm

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
    assert f"stopped after {stop} steps and saved" in capsys.readouterr().out
    assert cli.main(words(run, *name)) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert cli.main(words(run, *name, "detect.lr=0.5", "--resume")) == 2
    assert "begun with other values (detect.lr" in capsys.readouterr().err
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


def test_an_image_that_is_broken_or_absent_costs_that_image(run, tmp_path, capsys):
    """Found by the index, or by the decoder after the index was made; others have no object."""
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
    data = json.loads((run.parent / "instances.json").read_text())
    data["images"].append({**data["images"][0], "id": 999, "file_name": "gone.jpg"})
    bare = {each["id"] for each in data["images"][:30]}
    data["annotations"] = [each for each in data["annotations"] if each["image_id"] not in bare]
    (tmp_path / "instances.json").write_text(json.dumps(data))
    given = [f"data.path={tmp_path / 'images'}", f"data.instances={tmp_path / 'instances.json'}"]
    assert cli.main(words(run, "--name", "broken", *given, "detect.steps=17")) == 0
    told = capsys.readouterr().out
    assert "000003.jpg" in told
    assert "gone.jpg: no such file" in told
    assert lines_of(run / "broken")[-1]["step"] == 17


SECTION = cfg.Detect(size=64, longest=64, width=8, rois=16, proposals=32)
TARGET = {
    "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1]),
    "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
}  # fmt: skip


def detector(section: cfg.Detect, backbone: str = "resnet10", masks: bool = False) -> Detector:
    return Detector(build_backbone(backbone), 3, section, masks, join(CONFIG))


def test_frozen_stages_and_norms_do_not_change():
    section = SECTION.model_copy(update={"frozen_stages": 1})
    network = detector(section, masks=True)
    body = network.network.backbone.body
    before = {name: tensor.clone() for name, tensor in body.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network([torch.rand(3, 64, 64)] * 2, [TARGET] * 2).backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad), "ranks wait for each"
    optimizer.step()
    after = body.state_dict()
    changed = {name.split(".")[0] for name in after if (after[name] != before[name]).any()}
    assert changed == {"layer2", "layer3", "layer4"}
    fixed = detector(section.model_copy(update={"norm": "frozen", "frozen_stages": 0}))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fixed.modules())


MISTAKES = {
    "needs true boxes": ["data.instances=null"],
    "there is no file of annotations": ["detect.instances=[nothing.json]"],
    "cannot fill detect.batch 64": ["detect.batch=64"],
    "trained with another model.backbone": ["model.backbone=resnet18"],
    "has no true boxes; name their file by detect.val_instances": ["detect.val_path=elsewhere"],
    "detect.longest 40 is below": ["detect.longest=40"],
}


@pytest.mark.parametrize("told", MISTAKES)
def test_a_mistake_is_one_sentence(run, told, capsys):
    assert cli.main(words(run, "--name", "wrong", *MISTAKES[told])) == 2
    assert told in capsys.readouterr().err


TINY = {"size": [3, 3], "counts": [9]}
WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "none of 58 images has a box to train on; check data.instances": lambda data: data["annotations"].clear(),
    "1 is of the category 99, which is not listed": lambda data: data["annotations"][0].update(
        category_id=99
    ),
    "the id 1 occurs twice": lambda data: data["categories"].append({"id": 1, "name": "again"}),
    "occurs 2 times; remove the others": lambda data: data["categories"].append(
        {"id": 99, "name": data["categories"][0]["name"]}
    ),
    "has 3 x 3 pixels, and the image 48 x 48; correct": lambda data: data["annotations"][0].update(
        segmentation=TINY
    ),
    "None of the 64 files": lambda data: [e.update(file_name="x" + e["file_name"]) for e in data["images"]],
    "is not a COCO instances file (KeyError('images')": lambda data: data.pop("images"),
}


@pytest.mark.parametrize("told", WRONG)
def test_wrong_annotations_are_one_sentence(run, told, tmp_path, capsys):
    data = json.loads((run.parent / "instances.json").read_text())
    WRONG[told](data)
    (tmp_path / "wrong.json").write_text(json.dumps(data))
    assert cli.main(words(run, "--name", "wrong", f"data.instances={tmp_path / 'wrong.json'}")) == 2
    assert told in capsys.readouterr().err


def test_wrong_test_images_and_files_are_one_sentence(run, tmp_path, capsys):
    text = (run.parent / "instances.json").read_text()
    others = [{"id": each["id"], "name": f"other {each['name']}"} for each in json.loads(text)["categories"]]
    (tmp_path / "none.json").write_text(json.dumps({**json.loads(text), "annotations": []}))
    (tmp_path / "others.json").write_text(json.dumps({**json.loads(text), "categories": others}))
    (tmp_path / "cut.json").write_text(text[:300])
    for name, told in {
        "none": "none of 64 test images has a box to find; check detect.val_instances",
        "others": "has other categories than the training images, such as",
        "cut": "is not a COCO instances file (JSONDecodeError",
    }.items():
        assert cli.main(words(run, "--name", "wrong", f"detect.val_instances=[{tmp_path / name}.json]")) == 2
        assert told in capsys.readouterr().err
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    assert cli.main(words(tmp_path / "x.safetensors")) == 2
    assert "export the encoder again" in capsys.readouterr().err


@pytest.mark.parametrize("encoder", ["test_vit", "test_convnext"])
def test_an_encoder_without_stages_is_named(encoder):
    with pytest.raises(ValueError, match=r"has no stages of falling resolution .* needs a ResNet"):
        detector(cfg.Detect(), encoder)


def test_half_precision_computes_in_it_and_learns_in_full(run, whole):
    assert cli.main(words(run, "--name", "half", "run.amp=bf16", "detect.steps=3")) == 0
    first, expected = (losses(folder)[0][1] for folder in (run / "half", whole))
    assert first != expected
    assert first == pytest.approx(expected, rel=0.02), "before the first step, they differ by rounding"
    setting = replace(join(CONFIG), precision=torch.bfloat16)
    network = Detector(build_backbone("resnet10"), 3, SECTION, True, setting)
    seen = []
    network.network.backbone.body.layer2.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    network.network.rpn.anchor_generator.register_forward_hook(lambda _, __, out: seen.append(out[0].dtype))
    loss = network([torch.rand(3, 64, 64)], [TARGET])
    loss.backward()
    assert seen == [torch.bfloat16, torch.float32]
    assert {loss.dtype, *(p.grad.dtype for p in network.parameters())} == {torch.float32}
    found = network.eval()([torch.rand(3, 64, 64)])[0]
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32, "bfloat16 rounds 1,000 pixels by 4"


def test_batch_norm_is_over_all_gpus_or_over_those_of_each_process(monkeypatch):
    monkeypatch.setattr(Detector, "to", lambda self, *_, **__: self)  # there is no GPU
    setting = replace(join(CONFIG), device=torch.device("cuda"))
    for norm, kind in {"sync": SyncBatchNorm, "batch": torch.nn.BatchNorm2d}.items():
        with one_of(2):
            network = Detector(
                build_backbone("resnet10"), 3, SECTION.model_copy(update={"norm": norm}), False, setting
            )
        norms = [
            part for part in network.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
        ]
        assert {type(part) for part in norms} == {kind}
        assert sum(part in list(network.network.backbone.fpn.modules()) for part in norms) == 8


def statistics(rank: int, world: int, folder: str) -> int:
    """Running statistics after two images in training mode, shared among the ranks, into a file."""
    device = ranks.init("cpu")
    kernels = torch.library.Library("aten", "IMPL")
    for name, kernel in KERNELS.items() if world > 1 else ():
        kernels.impl(name, kernel, "CPU")
    torch.manual_seed(0)
    network = Detector(build_backbone("resnet10"), 3, SECTION, True, replace(join(CONFIG), device=device))
    network.network = synced_batch_norm(network.network)
    images = list(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    network(images[rank::world], [TARGET] * (2 // world)).backward()
    found = {name: value for name, value in network.state_dict().items() if "running" in name}
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    ranks.cleanup()
    return 0


@pytest.mark.slow
def test_statistics_of_two_ranks_are_those_of_one_with_the_images_of_both(tmp_path):
    for world in (1, 2):
        logs = tmp_path / f"logs-{world}"
        assert (
            finish(start(world, logs, statistics, lambda rank, w=world: (rank, w, str(tmp_path))), 120)
            == [0] * world
        ), (logs / "0.log").read_text()
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    torch.testing.assert_close(first, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second, first)
    assert any("fpn" in name for name in alone)


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
