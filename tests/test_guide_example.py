"""The example of docs/guides.md with models that are ours in no way: their boxes find objects."""

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
from torch import Tensor, nn

from dali_views import SampleIndex
from dali_views.maps import boxes_from_maps, heatmaps
from dali_views.tools.scenes import make_scenes
from trainers.evaluate.box_scores import localisation, reference

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guides.md"


@pytest.fixture(scope="module")
def code() -> tuple[str, str]:
    choice, loop = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return choice, loop


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
    loss = ((first - second).square().mean(1) * weights).mean()
    loss.backward()


def torchvision_vit() -> tuple[nn.Module, str, int, int]:
    model = torchvision.models.VisionTransformer(
        image_size=64, patch_size=8, num_layers=4, num_heads=2, hidden_dim=48, mlp_dim=96
    )
    return model, "encoder.layers.encoder_layer_3", 1, 64


def timm_vit() -> tuple[nn.Module, str, int, int]:
    model = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    return model, "blocks.5", model.num_prefix_tokens, 128


def timm_convnext() -> tuple[nn.Module, str, int, int]:
    return timm.create_model("test_convnext", num_classes=0), "stages.2", 0, 128


def run(loop: str, choice: tuple[nn.Module, str, int, int], folder: Path, monkeypatch: Any) -> Any:
    """The names that the loop leaves behind, beside a folder `photos`."""
    model, layer, prefix_tokens, size = choice
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DALI_VIEWS_CACHE", str(folder / "cache"))
    names = {"model": model, "layer": layer, "prefix_tokens": prefix_tokens, "size": size, "train_step": step}
    exec(compile(loop, str(PAGE), "exec"), names)
    return names


def test_the_example_runs_as_printed(
    code: tuple[str, str], photos: SampleIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, loop = code
    assert loop.count("\n") <= 17, "about fifteen lines are promised"
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(choice, str(PAGE), "exec"), names)
    chosen = (names["model"], names["layer"], names["prefix_tokens"], names["size"])
    few = tmp_path / "few"  # a network of this size takes its time
    (few / "photos").mkdir(parents=True)
    for row in range(8):
        shutil.copy(photos.path(row), few / "photos")
    regions = run(loop, chosen, few, monkeypatch)["regions"]
    assert (regions.writes == 2).all()
    assert np.median(np.prod(regions.boxes[:, 0, 2:] - regions.boxes[:, 0, :2], axis=1)) < 0.7


@pytest.mark.parametrize("choose", [timm_vit, torchvision_vit, timm_convnext])
def test_boxes_of_other_models_find_objects_where_the_published_reading_gives_whole_images(
    choose: Callable[[], tuple[nn.Module, str, int, int]],
    code: tuple[str, str],
    photos: SampleIndex,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    chosen = choose()
    names = run(code[1], chosen, Path(photos.root).parent, monkeypatch)
    boxes = names["regions"].boxes[:, 0]
    assert localisation(boxes, photos)["iou_best"] > 1.5 * reference(photos)["whole"]["iou_best"]
    model, layer, prefix_tokens, size = chosen
    batch = next(iter(names["whole"]))
    published = boxes_from_maps(heatmaps(model, batch.views[0], layer, prefix_tokens), 0.1, (size, size))
    assert (published[:, 2:] - published[:, :2]).prod(1).median() > 0.9
