"""The configurations of the project: each combination loads, fits together and says what it aims at."""

from __future__ import annotations

import json
import re
import runpy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import two_classes
from pages import Page
from runs import lines_of

from trainers import config as cfg
from trainers.cli import main
from trainers.config import file as config_file
from trainers.data import training_views
from trainers.encoders.backbones import build_backbone
from trainers.evaluate.labelled_sets import KNOWN, read_sets
from trainers.methods import build_method
from trainers.pretrain import pretrain

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
DATA = [name for name in FILES if name.startswith("data/")]
GUIDES = [name for name in FILES if name.startswith("guide/")]
DETECTORS = [name for name in FILES if name.startswith("detect/")]
SETS = [name for name in FILES if name.startswith("transfer/")]
RUNS = [name for name in FILES if name not in DATA + GUIDES + DETECTORS + SETS]
SMALL = ("cifar10", "cifar100", "stl10", "tiny_imagenet")
OURS = ("cpu.yaml", "demo.yaml")
PUBLISHED = [name for name in RUNS if name not in OURS]
# A run on the images it was published on, and on all others of its kind.
OTHERS = [
    (run, data)
    for run in PUBLISHED
    for data in DATA
    if (run.split("/")[0] in SMALL) == (Path(data).stem in SMALL)
]


@cache
def load(*names: str) -> cfg.Config:
    return config_file.load([CONFIGS / name for name in names])


def differences(one: tuple[str, ...], other: tuple[str, ...]) -> set[str]:
    return set(config_file.differences(load(*one), load(*other)))


def aims(name: str) -> list[str]:
    return [line for line in (CONFIGS / name).read_text("utf-8").splitlines() if line.startswith("# Aims at")]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_loads_and_its_views_can_be_built(name: str) -> None:
    config = load(name)
    whole, *small = training_views(config.views)[1:]
    assert (whole.size, whole.crop) == (config.views.size, config.views.crop)
    assert config.views.scale in (None, whole.scale)
    assert bool(small) <= (config.method.name in ("dino", "scfs", "lejepa")), (
        "other methods compare two views"
    )
    assert small or config.method.name != "scfs", "SCFS searches with local views"
    assert all(view.size < config.views.size and view.scale[1] <= whole.scale[1] for view in small)
    if name != "demo.yaml":  # its run folder is one of two arms
        assert config.run.out == f"runs/{name.removesuffix('.yaml')}"
    paths = [config.data.path, config.data.instances, config.data.eval_val, config.data.classes]
    assert not any(Path(path).is_absolute() for path in paths if path is not None)


@pytest.mark.parametrize(("run", "data"), OTHERS)
def test_other_images_change_the_images_alone(run: str, data: str) -> None:
    changed = differences((run, data), (run,))
    normalised = {"views.size", "views.mean", "views.std"}
    assert all(key.startswith("data.") or key in ("run.out", *normalised) for key in changed), changed
    part = {key.partition(".")[2] for key in changed if key.startswith("data.")}
    assert part or load(run).data.path == load(run, data).data.path
    if "imagenet/" in run and "imagenet" in data:
        assert changed - {"run.out"} <= {"data.classes"}


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("run", PUBLISHED)
def test_a_guide_changes_crops_and_guide_alone_and_writes_boxes_after_every_fifth(
    run: str, guide: str
) -> None:
    changed = differences((run, guide), (run,))
    shown = {"views.partner"} if "pairs" in guide else {"views.crop", "views.alpha"}
    assert changed & shown
    assert {"run.out", "guide.name"} <= changed
    assert {key for key in changed if not key.startswith("guide.")} <= {"run.out", *shown}
    config = load(run, guide)
    if isinstance(config.guide, cfg.ContrastiveCrop | cfg.Saliency):
        assert config.guide.warmup == config.guide.interval == config.run.epochs / 5


def test_scfs_and_its_baseline_differ_in_the_loss_alone() -> None:
    changed = differences(("imagenet/scfs_200ep.yaml",), ("imagenet/dino_200ep.yaml",))
    own = {f"method.{key}" for key in cfg.SCFS.model_fields.keys() - cfg.DINO.model_fields.keys()}
    assert {"run.out", "method.name"} <= changed <= {"run.out", "method.name"} | own
    assert load("imagenet/scfs_200ep.yaml").method == cfg.SCFS(), "the defaults are the published numbers"


def network_of(config: cfg.Config) -> tuple[cfg.Model, cfg.Method, int]:
    """Encoder, method and number of local views; DINO's with less of what costs time and fits anyway."""
    local = len(training_views(config.views)) - 2
    if not isinstance(config.method, cfg.DINO):
        return config.model, config.method, local
    same = {"output_dim": 32, "teacher_temperature": 0.04, "warmup_teacher_epochs": 0}
    return config.model, config.method.model_copy(update=same), min(2, local)


@torch.no_grad()
def test_every_distinct_network_and_method_fit_and_give_a_loss_per_sample() -> None:
    for model, method, local in {network_of(load(name)) for name in RUNS}:
        backbone = build_backbone(model.backbone, model.stem, model.zero_init_residual)
        network = build_method(method, backbone)
        # Tiny, yet divisible by every split_bn; sizes do not change what fits, for the pooling is global.
        views = [torch.rand(8, 3, size, size) for size in (16, 16, *[8] * local)]
        losses = network(views)
        assert losses.shape == (8,)
        assert torch.isfinite(losses).all()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_names_the_figures_it_aims_at_with_their_sources_or_says_that_there_is_none(name: str) -> None:
    assert aims(name)
    for line in aims(name):
        figure = re.search(r"(?<![\d.:])\d+\.\d+(?!\d|:)", re.sub(r"arXiv \S+", "", line))
        assert bool(figure and "(" in line) != line.startswith("# Aims at no published figure"), line
        assert "; ours: " in line, "it stands beside what was measured here"


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_loads_over_any_run_and_says_what_it_aims_at(name: str) -> None:
    config = config_file.override(
        load(RUNS[-1]), [], [CONFIGS / name], {"data": {"kind": "coco", "path": "-"}}
    )
    assert config.detect.steps > max(config.detect.drops)
    first = (CONFIGS / name).read_text("utf-8").partition("\n")[0]
    assert name == "detect/small.yaml" or re.search(r"aims at .*\d\d\.\d.*\(.*; .*\); ours: ", first)


@pytest.mark.parametrize("name", SETS)
def test_a_file_of_sets_names_every_class_that_is_known_and_needs_no_change_to_be_read(name: str) -> None:
    found = read_sets(CONFIGS / name, load(RUNS[-1]))
    assert {each.torchvision for each in found.values() if each.torchvision} == set(KNOWN)
    paths = [each.root for each in found.values()] + [each.config.data.path for each in found.values()]
    assert not any(Path(path).is_absolute() for path in paths)


def test_the_tables_of_the_readme_are_made_of_the_files() -> None:
    readme = runpy.run_path(str(CONFIGS / "table.py"))["readme"]
    assert readme() == (CONFIGS / "README.md").read_text("utf-8"), "run python configs/table.py"


def guided(folder: Path, photos: Path, *changes: str) -> tuple[list[dict[str, float]], Page]:
    """What the guide wrote in a few steps of the configuration for a CPU, and the page of the run."""
    words = [f"data.path={photos}", f"run.out={folder}", "optim.batch=8", "run.evaluate_every=0"]
    assert main(["pretrain", "configs/cpu.yaml", *words, *changes]) == 0
    assert main(["report", str(folder)]) == 0
    return [line for line in lines_of(folder) if "guide_whole" in line], Page(folder / "report.html")


@pytest.mark.slow
def test_boxes_of_the_first_run_on_a_cpu_guide_and_the_page_warns_of_boxes_that_do_not(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["run.epochs=3", "guide.interval=1"]
    passes, page = guided(tmp_path / "cpu", photographs, *steps)
    assert [line["epoch"] for line in passes] == [0, 1, 2]
    assert all(line["guide_whole"] < 0.05 and line["guide_area_median"] < 0.4 for line in passes)
    assert not page.has("Boxes are mostly the whole image")
    capsys.readouterr()
    coarse = ["guide.layer=layer4", "guide.size=32", "run.max_steps=1"]
    late, page = guided(tmp_path / "late", photographs, *coarse)
    assert "set guide.layer to an earlier one" in capsys.readouterr().err
    assert late[-1]["guide_area_median"] > 0.9
    warned, curves = page.text.index("Boxes are mostly the whole image"), page.text.index("Curves")
    assert warned < curves


COMBINATIONS = sorted(
    {(name, *re.findall(r"guide/\w+\.yaml", line)) for name in PUBLISHED for line in aims(name)}
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of few images and wide boxes
@pytest.mark.parametrize("names", COMBINATIONS, ids=lambda names: "+".join(names))
def test_a_run_with_its_guide_trains_four_steps_on_small_images(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    two_classes(tmp_path / "photos", 8)
    config = load(*names)
    small = ["views.size=32", "model.backbone=resnet10", "optim.batch=8"]
    small += ["views.local_size=16"] * (len(training_views(config.views)) > 3)
    small += ["method.output_dim=32"] * isinstance(config.method, cfg.DINO)
    small += ["guide.warmup=1", "guide.interval=1"] * isinstance(config.guide, cfg.Localised)
    small += ["guide.encoder=null", "guide.control=label"] * isinstance(config.guide, cfg.SemanticPairs)
    data = {key: None for key in ("instances", "classes", "boxes", "eval_train", "eval_val")}
    data |= {"kind": "folder", "path": str(tmp_path / "photos"), "val_share": 0}
    run = {"out": str(tmp_path / "run"), "epochs": 3, "max_steps": 4, "log_every": 1, "threads": 1}
    changed = tmp_path / "changed.yaml"
    changed.write_text(json.dumps({"data": data, "run": {**run, "device": "cpu", "evaluate_every": 0}}))
    found = pretrain(config_file.load([*(CONFIGS / name for name in names), changed], small))
    assert found.step == 4
    losses = [line["loss"] for line in lines_of(tmp_path / "run") if "loss" in line]
    assert all(np.isfinite(losses))
