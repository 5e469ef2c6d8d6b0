"""The commands that measure a run, as a user gives them, and the baselines that they can measure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from conftest import noise_images
from runs import lines_of, scenes_in, write_config
from safetensors.torch import load_file, save_file

from trainers import cli
from trainers.engine import checkpoint
from trainers.evaluate import knn
from trainers.saved_run import ColourHistogram, encoder_of, load_run

TREE = {
    "views": {"size": 16, "blur": 0, "name": "dino", "locals": 1, "local_size": 8},
    "model": {"backbone": "resnet10"},
    "method": {"name": "dino", "hidden_dim": 16, "bottleneck_dim": 8, "output_dim": 16, "momentum": 0.5},
    "optim": {"name": "sgd", "lr": 0.1, "batch": 16},
}
QUICK = ["probe.epochs=2", "probe.batch=16", "finetune.epochs=2", "finetune.labels=0.5", "finetune.batch=8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps of DINO, for this process alone: evaluations write into its folder."""
    folder = tmp_path_factory.mktemp("run")
    file = write_config(folder, scenes_in(folder), **TREE, guide={"name": "none"}, run={"epochs": 1})
    assert cli.main(["pretrain", str(file)]) == 0
    return folder / "run"


def test_knn_of_several_k_and_of_the_baselines(run, capsys):
    assert cli.main(["knn", str(run), "-k", "1", "5", "run.threads=1"]) == 0
    assert cli.main(["knn", str(run / "last.pt"), "-k", "5", "--encoder", "colours"]) == 0
    told, quiet = capsys.readouterr()
    assert "lower -k" not in quiet
    assert cli.main(["knn", str(run), "-k", "30", "--encoder", "untrained"]) == 0
    assert "k 30 is more than half of the 48 neighbours" in capsys.readouterr().err
    scored = r"top-1 [\d.]+% ± [\d.]+%, top-5 [\d.]+%, largest class [\d.]+%\n"
    known = r"trained encoder, 3 steps: kNN \(k 1, T 0\.07, 48 neighbours, 16 queries\): "
    assert re.search(known + scored, told)
    assert "colours encoder" in told
    lines = lines_of(run, "evaluations.jsonl")[-4:]
    expected = [("trained", 1), ("trained", 5), ("colours", 5), ("untrained", 30)]
    assert [(line["encoder"], line["k"]) for line in lines] == expected
    assert all(0 <= line["top1"] <= line["top5"] <= 1 for line in lines)


@pytest.mark.parametrize("command", ["linear", "finetune"])
def test_a_classifier_by_one_command_which_is_resumed_or_named_anew_but_not_overwritten(run, capsys, command):
    words = [command, str(run), *QUICK]
    assert cli.main(words) == 0
    assert "(2 epochs): top-1" in capsys.readouterr().out
    found = lines_of(run, "evaluations.jsonl")[-1]
    assert found["evaluation"] == found["name"] == command
    assert cli.main(words) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*words, "--resume"]) == 0
    assert lines_of(run, "evaluations.jsonl")[-1]["top1"] == found["top1"]
    assert cli.main([*words, "--name", f"{command}-again", "--encoder", "untrained"]) == 0
    assert lines_of(run, "evaluations.jsonl")[-1]["name"] == f"{command}-again"
    assert lines_of(run, "evaluations.jsonl")[-1]["encoder"] == "untrained"


def test_the_encoder_is_exported_by_one_command(run, tmp_path):
    out = tmp_path / "encoder.safetensors"
    assert cli.main(["export", str(run), str(out), "--format", "timm"]) == 0
    saved = checkpoint.load(run)["method"]["teacher_backbone.conv1.weight"]
    assert torch.equal(load_file(out)["conv1.weight"], saved)


def test_the_untrained_encoder_has_the_weights_that_the_run_began_with(run):
    _, config, saved = load_run(run)
    kinds = ("untrained", "untrained", "trained")
    nets = [encoder_of(config, saved, kind, torch.device("cpu")) for kind in kinds]
    first, again, trained = (net.conv1.weight for net in nets)
    assert torch.equal(first, again)
    assert not torch.equal(first, trained)


def test_a_histogram_counts_the_colours_wherever_they_are():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    encoder = ColourHistogram(mean, std)
    image = torch.zeros(3, 4, 4)
    image[0, :, :1] = 1.0  # a quarter red, the rest black
    normalised = (image - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    (found,) = encoder(normalised[None])
    assert found.nonzero().flatten().tolist() == [0, 7 * 64]
    assert found[[0, 448]].square().tolist() == pytest.approx([0.75, 0.25])
    (turned,) = encoder(normalised.rot90(dims=(1, 2))[None])
    assert torch.equal(found, turned)


def test_mistakes_are_answered_in_one_sentence(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(knn, "extract", None)  # a senseless vote is told before any feature is computed
    checkpoint.save(tmp_path / "linear", {"description": {}, "curve": []})
    noise_images(tmp_path / "photos", 40)
    photos = ["data.kind=folder", f"data.path={tmp_path / 'photos'}", "data.instances=null"]
    for words, told in (
        (["finetune", run, "--encoder", "colours"], "there is no 'colours', but trained, untrained"),
        (["export", run, tmp_path / "out", "run.threads=1"], "unrecognized arguments: run.threads=1"),
        (["linear", tmp_path], "there is no checkpoint"),
        (["linear", run, "probe.epoch=3"], "did you mean probe.epochs?"),
        (["knn", run, "knn.temperature=0"], "knn.temperature should be greater than 0, not 0"),
        (["knn", run, "-k", "5", "0"], "at least 1, not 0"),
        (["knn", run, "model.backbone=resnet18", "method.hidden_dim=8"],
         "with another method.hidden_dim, model.backbone"),
        (["knn", tmp_path / "linear"], "training run"),
        (["pretrain", run.parent / "config.yaml", f"run.out={tmp_path / 'linear'}"], "training run"),
        (["localise", run, *photos], "name them by data.boxes or data.instances"),
    ):  # fmt: skip
        assert cli.main([str(word) for word in words]) == 2
        assert told in capsys.readouterr().err


def test_localise_scores_every_kind_of_map_beside_boxes_that_look_at_nothing(run, capsys):
    assert cli.main(["localise", str(run), "localise.layer=layer2", "localise.size=48"]) == 0
    told = capsys.readouterr().out
    assert "trained encoder, layer2 at 48 pixels, 48 images with true boxes" in told
    lines = {
        line["boxes"]: line for line in lines_of(run, "evaluations.jsonl") if line["evaluation"] == "localise"
    }
    kinds = ("activation", "principal", "gradient")
    assert set(lines) == {
        *kinds,
        *(f"{kind}, {rule}" for kind in kinds for rule in ("auto", "otsu")),
        "centre",
        "whole",
        "random",
    }
    assert all(0 <= line["iou_best"] <= 1 for line in lines.values())
    assert lines["principal"]["iou_best"] > lines["whole"]["iou_best"]
    assert lines["activation, otsu"]["area"] < 1


def test_localise_takes_an_encoder_of_a_library_with_weights_from_a_file(run, capsys, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), file)
    assert cli.main(["localise", str(run), "--encoder", f"timm:test_vit:{file}"]) == 0
    told = capsys.readouterr().out
    assert "at 160 pixels" in told  # what timm's weights of this name were trained with
    assert "gradient" not in told, "an encoder alone has no alignment score"
