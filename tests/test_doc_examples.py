"""What docs/guides.md and docs/extending.md print does what they say."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import noise_images, two_classes
from runs import ROOT
from safetensors.torch import load_file
from torch import Tensor, nn

from dali_views import SampleIndex, recipes
from dali_views.maps import boxes_from_maps, heatmaps
from dali_views.tools import cli as loader_cli
from dali_views.tools.scenes import make_scenes
from trainers import cli as trainer_cli
from trainers.engine import checkpoint
from trainers.evaluate.box_scores import localisation, reference

Chosen = tuple[nn.Module, str, int, int]


def printed(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """Scenes with known objects in a folder `photos`."""
    folder = tmp_path_factory.mktemp("example")
    images, instances = make_scenes(folder / "scenes", 40, size=96)
    images.rename(folder / "photos")
    return SampleIndex.from_coco(folder / "photos", instances, progress=False)


def step(model: nn.Module, views: list[Tensor], weights: Tensor) -> None:
    """The simplest loss that has a gradient."""
    first, second = (model(view).flatten(1) for view in views)
    ((first - second).square().mean(1) * weights).mean().backward()


def torchvision_vit() -> Chosen:
    model = torchvision.models.VisionTransformer(64, 8, num_layers=4, num_heads=2, hidden_dim=48, mlp_dim=96)
    return model, "encoder.layers.encoder_layer_3", 1, 64


def timm_vit() -> Chosen:
    model = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    return model, "blocks.5", model.num_prefix_tokens, 128


def timm_convnext() -> Chosen:
    return timm.create_model("test_convnext", num_classes=0), "stages.2", 0, 128


def looped(choice: Chosen, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the loop of the page leaves, beside a folder `photos`."""
    monkeypatch.chdir(folder)
    names = dict(zip(("model", "layer", "prefix_tokens", "size"), choice, strict=True), train_step=step)
    exec(compile(printed("guides.md", "python")[1], "docs/guides.md", "exec"), names)
    return names


def test_a_guide_of_ones_own_runs_as_printed(
    photos: SampleIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, loop = printed("guides.md", "python")
    assert loop.count("\n") <= 17, "about fifteen lines are promised"
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(choice, "docs/guides.md", "exec"), names)
    (tmp_path / "photos").mkdir()
    for row in range(8):  # a network of this size takes its time
        shutil.copy(photos.path(row), tmp_path / "photos")
    chosen = (names["model"], names["layer"], names["prefix_tokens"], names["size"])
    regions = looped(chosen, tmp_path, monkeypatch)["regions"]
    assert (regions.writes == 2).all()
    assert np.median(np.prod(regions.boxes[:, 0, 2:] - regions.boxes[:, 0, :2], axis=1)) < 0.7


NAMED = {
    "ResNet, of torchvision and timm": (lambda: torchvision.models.resnet18(), 96),
    "ConvNeXt of timm": (lambda: timm.create_model("test_convnext"), 96),
    "ConvNeXt of torchvision": (lambda: torchvision.models.convnext_tiny(), 96),
    "ViT of timm": (lambda: timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True), 96),
    "ViT of torchvision": (lambda: torchvision.models.VisionTransformer(96, 16, 12, 2, 48, 96), 96),
    "Swin of timm": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), 224),
    "Swin of torchvision": (lambda: torchvision.models.swin_t(), 96),
}


def test_the_layers_that_are_named_give_maps_of_the_stated_size() -> None:
    page = (ROOT / "docs" / "guides.md").read_text(encoding="utf-8")
    lines = page.split("### Names of layers")[1].split("\n\n")[1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[0] for row in rows] == list(NAMED)
    for name, layers, more, _ in rows:
        model, size = NAMED[name][0](), NAMED[name][1]
        given = eval(f"dict({more.strip('`')})", {"model": model})
        images = torch.randn(1, 3, size, size)
        for layer, stride in zip(re.findall(r"`([\w.]+)`", layers), (16, 8), strict=False):
            maps = heatmaps(model, images, layer, aligned=False, **given)
            assert maps.shape == (1, size // stride, size // stride), (name, layer)


@pytest.mark.parametrize("choose", [timm_vit, torchvision_vit, timm_convnext])
def test_boxes_of_other_models_find_objects_where_the_published_reading_gives_whole_images(
    choose: Callable[[], Chosen], photos: SampleIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, layer, prefix_tokens, size = chosen = choose()
    names = looped(chosen, Path(photos.root).parent, monkeypatch)
    boxes = names["regions"].boxes[:, 0]
    assert localisation(boxes, photos)["iou_best"] > 1.5 * reference(photos)["whole"]["iou_best"]
    batch = next(iter(names["whole"]))
    published = boxes_from_maps(heatmaps(model, batch.views[0], layer, prefix_tokens), 0.1, (size, size))
    assert (published[:, 2:] - published[:, :2]).prod(1).median() > 0.9


def test_the_first_runs_train_as_printed_and_with_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, recipe = (ROOT / "docs" / "extending.md").read_text("utf-8"), printed("extending.md", "python")[1]
    noise_images(tmp_path / "photos", 70)
    monkeypatch.chdir(tmp_path)
    given = re.findall(r"^    python -m trainers (pretrain configs/cpu.yaml .*)$", page, re.MULTILINE)
    for line, run in zip(given, ("runs/cpu", "runs/mine"), strict=True):
        assert trainer_cli.main(line.split()) == 0
        assert checkpoint.load(run)["step"] == 2
    scope = dict(vars(recipes))
    exec(compile(recipe, "docs/extending.md", "exec"), scope)
    (name,) = set(scope) - set(vars(recipes))
    monkeypatch.setitem(recipes.BY_NAME, name, scope[name])
    show = ["show", "photos", "--recipe", name, "--device", "cpu", "--out", "views.html"]
    monkeypatch.setattr("sys.argv", ["dali-views", *show])
    assert loader_cli.main() == 0
    assert (tmp_path / "views.html").is_file()
    small = [f"views.name={name}", "views.local_size=16", "method.name=dino", "method.output_dim=64"]
    assert trainer_cli.main([*given[0].split(), "run.out=own", *small]) == 0
    assert checkpoint.load("own")["step"] == 2


def test_a_method_of_ones_own_trains_resumes_is_evaluated_and_exported_without_its_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (configuration,), (method, _) = printed("extending.md", "yaml"), printed("extending.md", "python")
    two_classes(tmp_path / "photos", 24)
    (tmp_path / "vicreg.yaml").write_text(configuration)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "vicreg"}
    exec(compile(method, "docs/extending.md", "exec"), scope)
    load, pretrain, own = scope["load"], scope["pretrain"], scope["VICReg"]
    assert pretrain(load("vicreg.yaml", ["run.max_steps=2"]), own_method=own).step == 2
    assert pretrain(load("vicreg.yaml"), resume=True, own_method=own).finished
    whole = pretrain(load("vicreg.yaml", ["run.out=runs/whole"]), own_method=own)
    one, other = (checkpoint.load(f"runs/{name}")["method"] for name in ("vicreg", "whole"))
    assert whole.finished
    assert all(torch.equal(one[name], other[name]) for name in one)
    probed = ["probe.epochs=1", "probe.batch=8"]
    for words in (
        ["knn", "runs/vicreg", "-k", "3"],
        ["knn", "runs/vicreg", "-k", "3", "--encoder", "untrained"],
        ["linear", "runs/vicreg", *probed],
        ["export", "runs/vicreg", "encoder.safetensors"],
        ["report", "runs/vicreg"],
    ):
        assert trainer_cli.main(words) == 0, words
    exported = load_file("encoder.safetensors")
    assert torch.equal(exported["layer1.0.conv1.weight"], one["backbone.layer1.0.conv1.weight"])
    assert trainer_cli.main(["pretrain", "vicreg.yaml", "run.out=runs/b"]) == 2
    assert "a file or a command loads no code" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"method\.name moco does not fit"):
        pretrain(load("vicreg.yaml", ["method={name: moco}", "run.out=runs/c"]), own_method=own)


def test_the_example_of_detection_moves_boxes_with_their_objects(photos, monkeypatch):
    """The page's folder has no boxes; here the index has some, and bright pixels are where they are moved."""
    monkeypatch.chdir(Path(photos.root).parent)
    (code,) = printed("transfer.md", "python")
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["image"].shape[1:] == tuple(found["shape"])
    truth = photos.truth(0)
    names = {"index": photos, "row": 0, "shape": [10, 20], "torch": torch}
    move = code[code.index("        boxes = ") :]
    lines = "\n".join(line.removeprefix("        ") for line in move.splitlines())
    exec(lines, plain := {**names, "flipped": False})
    exec(lines, mirrored := {**names, "flipped": True})
    assert torch.allclose(plain["boxes"], torch.from_numpy(truth) * torch.tensor([10, 20, 10, 20]))
    assert torch.allclose(mirrored["boxes"][:, 1] + plain["boxes"][:, 3], torch.tensor(20.0))
    assert torch.equal(mirrored["boxes"][:, [0, 2]], plain["boxes"][:, [0, 2]])
