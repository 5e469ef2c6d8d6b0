"""What docs/coming-from.md shows runs as printed, and weights in the form of the other projects are taken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import two_classes
from runs import ROOT

from dali_views import RegionTable
from trainers.encoders.backbones import build_backbone
from trainers.encoders.weights import load_weights

PAGE = ROOT / "docs" / "coming-from.md"


def run(heading: str, **names: Any) -> dict[str, Any]:
    """The names that the blocks of a section leave, one after the other."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(compile(code, f"{PAGE.name}, {heading}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_classes(tmp_path / "photos", 10)
    monkeypatch.chdir(tmp_path)


LOADERS = ["From a PyTorch DataLoader (torchvision, timm) or WebDataset", "Plain DALI", "FFCV"]


@pytest.mark.parametrize("heading", LOADERS)
def test_two_views_of_a_folder_are_two_views_here(heading: str) -> None:
    names = run(heading)
    assert [view.shape[2:] for view in (names["first"], names["second"])] == [(64, 64)] * 2
    assert names["loader"].epoch == 1, "an epoch that is not set repeats the first"


def test_the_loss_and_the_model_of_lightly_stay_and_its_weights_start_a_run() -> None:
    pytest.importorskip("lightly")
    names = run("lightly")
    assert names["loss"].isfinite()
    encoder = build_backbone("resnet18")
    load_weights(encoder, "from-lightly.pt")
    assert torch.equal(encoder.get_parameter("conv1.weight"), names["backbone"][0].weight)


def test_checkpoints_in_the_forms_of_solo_learn_and_contrastive_crop_start_a_run() -> None:
    theirs = torchvision.models.resnet18()
    tensors = theirs.state_dict()
    del tensors["fc.weight"], tensors["fc.bias"]
    lightning = {f"backbone.{name}": value for name, value in tensors.items()}
    lightning |= {f"momentum_backbone.{name}": torch.zeros_like(value) for name, value in tensors.items()}
    torch.save({"state_dict": lightning, "epoch": 3}, "solo.ckpt")
    moco = {f"module.encoder_q.{name}": value for name, value in tensors.items()}
    moco |= {f"module.encoder_k.{name}": torch.zeros_like(value) for name, value in tensors.items()}
    moco |= {"module.encoder_q.fc.0.weight": torch.zeros(512, 512), "module.queue": torch.zeros(128, 16)}
    boxes = torch.tensor([[0.25, 0.0, 0.75, 0.5]]).repeat(20, 1)
    torch.save({"moco_state": moco, "boxes": boxes, "epoch": 3}, "last.pth")
    table: RegionTable = run("ContrastiveCrop's code")["regions"]
    assert (torch.tensor(table.boxes[:, 0]) == boxes).all()
    for file in ("solo.ckpt", "from-contrastive-crop.pt"):
        encoder = build_backbone("resnet18")
        load_weights(encoder, file)
        assert torch.equal(encoder.get_parameter("layer1.0.conv1.weight"), theirs.layer1[0].conv1.weight)


def test_files_that_the_page_names_exist() -> None:
    named = re.findall(r"configs/[\w/]+\.yaml", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 4
    assert [name for name in named if not (ROOT / name).is_file()] == []
