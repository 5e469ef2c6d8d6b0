"""The examples of docs/reuse.md run as printed, and do what the page says of them."""

from __future__ import annotations

import os
import pydoc
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dali_views import Batch, SampleIndex, View, ViewLoader, recipes
from dali_views.tools.scenes import make_scenes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reuse.md"
COUNT = 34
"""Photographs: four batches of 8 in an epoch, and two left over."""


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images with objects in a folder of two classes, in the folder where the examples run."""
    images, _ = make_scenes(tmp_path / "scenes", COUNT, size=96)
    for number, path in enumerate(sorted(images.iterdir())):
        home = tmp_path / "photos" / ("cats", "dogs")[number % 2]
        home.mkdir(parents=True, exist_ok=True)
        path.rename(home / path.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def section(heading: str) -> str:
    return PAGE.read_text(encoding="utf-8").split(f"\n## {heading}")[1].split("\n## ")[0]


def printed(heading: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", section(heading), re.DOTALL)
    return code


def run(heading: str) -> dict[str, Any]:
    """The names that a section's code leaves behind."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(printed(heading), str(PAGE), "exec"), names)
    return names


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Killed(BaseException):
    """Nobody catches it."""


def killed_at(step: int, heading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a section until the optimiser has made some steps, and end it there."""
    whole, left = torch.optim.SGD.step, iter(range(step))

    def one_more(*given: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise Killed
        return whole(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", one_more)
        with pytest.raises(Killed):
            run(heading)


@pytest.mark.slow
def test_a_loop_of_ones_own_goes_on_where_it_was_killed(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("A loop of your own")
    assert (whole["regions"].writes == 2).all()
    assert np.median(np.prod(np.diff(whole["regions"].boxes[:, 0].reshape(-1, 2, 2), axis=1), axis=2)) < 0.9
    Path("last.pt").unlink()
    killed_at(3, "A loop of your own", monkeypatch)  # in mid-epoch
    killed_at(2, "A loop of your own", monkeypatch)  # the last checkpoint is of a table not yet written
    state = torch.load("last.pt")["loader"]
    assert (state["epoch"], state["position"], state["table"]["written"].any()) == (0, 32, False)
    resumed = run("A loop of your own")
    assert same(resumed["model"].state_dict(), whole["model"].state_dict())
    assert np.array_equal(resumed["regions"].boxes, whole["regions"].boxes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's own, and that there is no checkpoint yet
def test_lightning_keeps_the_loader_and_its_table_and_goes_on_in_mid_epoch(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lightning")
    whole = run("PyTorch Lightning")
    assert (whole["trainer"].datamodule.loader.regions.writes == 1).all()
    end = torch.load("checkpoints/last.ckpt")
    # The last checkpoint is at the end of an epoch, or amid one.
    for steps, stands in [(4, (0, 32)), (7, (1, 16))]:
        shutil.rmtree("checkpoints")
        killed_at(steps, "PyTorch Lightning", monkeypatch)
        saved = torch.load("checkpoints/last.ckpt")["loops"]["fit_loop"]["state_dict"]
        (loader,) = saved["combined_loader"]
        assert (loader["epoch"], loader["position"]) == stands
        resumed = run("PyTorch Lightning")
        assert same(torch.load("checkpoints/last.ckpt")["state_dict"], end["state_dict"])
        boxes = [names["trainer"].datamodule.loader.regions.boxes for names in (whole, resumed)]
        assert np.array_equal(*boxes)


def test_boxes_of_ones_own_are_those_of_the_batches(photos: Path) -> None:
    names = run("Boxes of your own")
    height, width = names["index"].sizes[0]
    box = np.float32([20 / height, 10 / width, 60 / height, 50 / width])
    assert np.allclose(names["regions"].boxes[:, 0], box)
    true = names["true"]
    assert true.written.tolist() == [row < 20 for row in range(COUNT)]
    assert np.allclose(true.boxes[:20, 0], box)
    assert np.allclose(names["several"].boxes[0], [[0.1, 0.1, 0.5, 0.5], [200 / 480, 300 / 640, 1, 1]])
    batch = names["batch"]  # of two regions, one is drawn with its weight
    given = torch.tensor(names["several"].boxes[0])
    drawn = (batch.boxes[:, None] == given).all(2).float().argmax(1)
    assert (batch.boxes == given[drawn]).all()
    assert torch.allclose(batch.weights, torch.tensor([1.5, 0.5])[drawn])


def test_half_precision_trains_under_autocast(photos: Path) -> None:
    names = run("Half precision")
    assert names["batch"].views[0].dtype == torch.float16
    assert names["loss"].isfinite()
    assert all(parameter.dtype == torch.float32 for parameter in names["model"].parameters())


@pytest.mark.slow
def test_processes_of_torchrun_share_their_boxes(photos: Path) -> None:
    Path("train.py").write_text(printed("Several processes"))
    (launch,) = re.findall(r"`torchrun ([^`]*)`", section("Several processes"))
    command = [sys.executable, "-m", "torch.distributed.run", *launch.split()]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert (torch.load("last.pt")["loader"]["table"]["writes"] == 2).all()


def test_timm_models_give_boxes_that_are_parts_of_the_image(photos: Path) -> None:
    names = run("A timm model")
    for boxes in names["boxes"].values():
        area = np.prod(boxes[:, 0, 2:] - boxes[:, 0, :2], axis=1)
        assert 0 < np.median(area) < 0.9
    assert torch.equal(names["batch"].boxes.cpu(), torch.from_numpy(boxes[names["batch"].index.cpu(), 0]))


def test_losses_of_lightly_take_the_views(photos: Path) -> None:
    pytest.importorskip("lightly")
    names = run("Losses of lightly")
    assert names["loss"].item() > 0
    assert names["multi_crop"].isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in names["model"].parameters())


def test_partners_and_weights_are_those_of_the_table(photos: Path) -> None:
    names = run("Own views, partners")
    batch, rows = names["batch"], names["rows"]
    assert torch.equal(batch.partner, (batch.index + 1) % len(rows))
    assert torch.equal(batch.weights, torch.where(batch.index % 2 == 1, 0.5, 2.0))
    assert [view.partner for view in names["added"]] == [False, False, True]


def test_help_of_a_class_tells_every_field() -> None:
    for kind in (View, Batch):
        told = pydoc.plain(pydoc.render_doc(kind))
        missing = [
            field.name for field in fields(kind) if not re.search(rf"^ \|\s+{field.name}: \S", told, re.M)
        ]
        assert missing == []
    table = section("What a batch holds")
    assert [field.name for field in fields(Batch) if f"`{field.name}`" not in table] == []


def test_a_local_view_lies_in_its_view_and_a_twin_has_its_place(photos: Path) -> None:
    names = run("Views inside views, and plain twins")
    assert names["part"].min() > -1e-5
    assert names["part"].max() < 1 + 1e-5
    batch = names["batch"]
    for told in (batch.crops, batch.flipped, batch.rotated):
        assert torch.equal(told[:, 3], told[:, 0])
    assert batch.rotated.any()


def test_features_stand_in_the_order_of_the_index_and_a_broken_image_has_none(photos: Path) -> None:
    names = run("Features of a folder")
    index, model = names["index"], names["model"]
    one = ViewLoader(index.subset([13]), recipes.evaluation(64), 1, device="cpu", shuffle=False)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model.cpu()(next(iter(one)).views[0]))
    assert torch.allclose(names["features"][13].cpu(), expected[0], atol=1e-3)
    assert len(names["features"]) == COUNT
    assert 0 <= names["accuracy"] <= 1

    SampleIndex.from_folder("photos", progress=False)  # kept, and believed as long as files look the same
    victim = Path(index.path(3))
    status, size = victim.stat(), victim.stat().st_size
    victim.write_bytes(victim.read_bytes()[:4] + bytes(size - 4))
    os.utime(victim, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.warns(UserWarning, match=victim.name):
        names = run("Features of a folder")
    assert names["rows"].tolist() == [row for row in range(COUNT) if row != 3]
    assert len(names["features"]) == len(names["labels"]) == COUNT - 1
