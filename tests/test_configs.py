"""The configurations that come with the project: each loads, fits together and says what it aims at."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from trainers import config as cfg
from trainers.config import file as config_file
from trainers.data import training_views
from trainers.encoders.backbones import build_backbone
from trainers.methods import build_method

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
GUIDED = [name for name in FILES if name.endswith("ccrop.yaml")]
METHODS = ["simclr", "moco_v2", "byol", "simsiam", "dino", "scfs"]
DATA_SETS = sorted({name.split("/")[0] for name in FILES if "/" in name})
PAIRS = [(folder, method) for folder in DATA_SETS for method in METHODS]
FIGURE = re.compile(r"(?<![\d.:])\d+\.\d+(?!\d|:)")
every_file = pytest.mark.parametrize("name", FILES)


def first_line(name: str) -> str:
    return (CONFIGS / name).read_text(encoding="utf-8").splitlines()[0]


def figures(text: str) -> list[str]:
    """The figures of a text; numbers of arXiv papers are none."""
    return FIGURE.findall(re.sub(r"arXiv \S+", "", text))


def readme_rows() -> dict[str, list[str]]:
    """The other cells of each row of the README's table, by the file that the row is about."""
    lines = (CONFIGS / "README.md").read_text(encoding="utf-8").splitlines()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")
    ]
    rows = {row[0].strip("`"): row[1:] for row in cells}
    assert len(rows) == len(cells), "a file stands twice in the table"
    return rows


@cache
def load(name: str) -> cfg.Config:
    return config_file.load(CONFIGS / name)


def differences(one: str, other: str) -> set[str]:
    return set(config_file.differences(load(one), load(other)))


@pytest.mark.parametrize(("folder", "method"), PAIRS)
def test_every_method_has_a_file_for_every_data_set(folder: str, method: str) -> None:
    assert f"{folder}/{method}.yaml" in FILES
    assert load(f"{folder}/{method}.yaml").method.name == method.removesuffix("_v2")


@every_file
def test_it_loads_and_its_views_can_be_built(name: str) -> None:
    config = load(name)
    views = training_views(config.views)
    whole, small = views[:2], views[2:]
    assert {(view.size, view.crop) for view in whole} == {(config.views.size, config.views.crop)}
    if config.views.scale is not None:
        assert {view.scale for view in whole} == {config.views.scale}
    assert len(whole) == 2
    if config.method.name not in ("dino", "scfs"):
        assert not small, "these methods compare two views"
    elif config.method.name == "scfs":
        assert small, "SCFS searches with local views"
    assert all(view.size < config.views.size and view.scale[1] <= whole[0].scale[1] for view in small)


@every_file
def test_its_run_folder_is_its_own_name_and_its_paths_are_relative(name: str) -> None:
    config = load(name)
    if name != "demo.yaml":  # whose run folder is one of two arms
        assert config.run.out == f"runs/{name.removesuffix('.yaml')}"
    data = config.data
    paths = [config.run.out, data.path, data.instances, data.eval_val, data.classes]
    assert not any(Path(path).is_absolute() for path in paths if path is not None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("folder", ["cifar100", "stl10", "tiny_imagenet"])
def test_a_small_data_set_differs_from_cifar10_in_its_images_alone(folder: str, method: str) -> None:
    changed = differences(f"{folder}/{method}.yaml", f"cifar10/{method}.yaml")
    allowed = {"run.out", "views.size", "views.local_size", "views.mean", "views.std"}
    assert {"run.out", "data.kind", "data.path", "views.mean", "views.std"} <= changed
    assert all(key in allowed or key.startswith("data.") for key in changed), changed


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("folder", ["imagenet100", "imagenet200"])
def test_a_part_of_imagenet_differs_from_the_whole_in_its_classes_alone(folder: str, method: str) -> None:
    name = f"{folder}/{method}.yaml"
    assert differences(name, f"imagenet/{method}.yaml") == {"run.out", "data.classes"}
    assert load(name).data.classes == f"data/{folder}.txt"


def test_scfs_and_its_baseline_differ_in_the_loss_alone() -> None:
    changed = differences("imagenet/scfs_200ep.yaml", "imagenet/dino_200ep.yaml")
    own = {f"method.{key}" for key in cfg.SCFS.model_fields.keys() - cfg.DINO.model_fields.keys()}
    assert {"run.out", "method.name"} <= changed <= {"run.out", "method.name"} | own
    assert load("imagenet/scfs_200ep.yaml").method == cfg.SCFS(), "the defaults are the published numbers"


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("_200ep.yaml")])
def test_a_longer_run_has_the_views_and_the_network_of_the_shorter_one(name: str) -> None:
    changed = differences(name, name.replace("_200ep", ""))
    assert load(name).run.epochs == 200
    if "dino" not in name:  # whose longer run is SCFS's
        assert all(key.startswith("optim.") for key in changed - {"run.out", "run.epochs"}), changed


@every_file
def test_crops_follow_the_boxes_if_and_only_if_somebody_writes_boxes_in_time(name: str) -> None:
    config = load(name)
    assert (config.views.crop in ("contrastive", "inside")) == (config.guide.name != "none")
    if isinstance(config.guide, cfg.ContrastiveCrop):
        assert config.guide.warmup % config.guide.interval == 0, "boxes would be later than the warm-up says"
        assert config.guide.warmup < config.run.epochs


@pytest.mark.parametrize("name", [name for name in GUIDED if "simccrop" not in name])
def test_boxes_are_written_after_every_fifth_of_the_run(name: str) -> None:
    config = load(name)
    assert isinstance(config.guide, cfg.ContrastiveCrop)
    assert config.guide.warmup == config.guide.interval == config.run.epochs / 5


@pytest.mark.parametrize("name", GUIDED)
def test_a_guided_arm_differs_from_its_base_in_crops_and_guide_alone(name: str) -> None:
    path = CONFIGS / name
    base = path.parent / yaml.safe_load(path.read_text(encoding="utf-8"))["base"]
    changed = config_file.differences(config_file.load(path), config_file.load(base))
    assert {"run.out", "views.crop", "guide.name"} <= set(changed)
    assert all(
        key in ("run.out", "views.crop", "views.alpha") or key.startswith("guide.") for key in changed
    ), changed


def network_of(config: cfg.Config) -> tuple[cfg.Model, cfg.Method, int]:
    """Encoder, method and number of local views; of DINO's, with less of what costs time and fits anyway."""
    local = len(training_views(config.views)) - 2
    if not isinstance(config.method, cfg.DINO):
        return config.model, config.method, local
    same = {"output_dim": 32, "teacher_temperature": 0.04, "warmup_teacher_epochs": 0}
    return config.model, config.method.model_copy(update=same), min(2, local)


@torch.no_grad()
def test_every_distinct_network_and_method_fit_and_give_a_loss_per_sample() -> None:
    for model, method, local in {network_of(load(name)) for name in FILES}:
        backbone = build_backbone(model.backbone, model.stem, model.zero_init_residual)
        network = build_method(method, backbone)
        # Tiny, yet divisible by every split_bn; sizes do not change what fits, for the pooling is global.
        views = [torch.rand(8, 3, size, size) for size in (16, 16, *[8] * local)]
        losses = network(views)
        assert losses.shape == (8,)
        assert torch.isfinite(losses).all()


@every_file
def test_its_first_line_names_the_figure_it_aims_at_or_says_that_there_is_none(name: str) -> None:
    line = first_line(name)
    assert line.startswith("# Aims at ")
    if not line.startswith("# Aims at no published figure"):
        assert figures(line), line
        assert "(" in line, "a figure has a source"
        assert "; ours: " in line, "and stands beside what was measured here"


def test_the_readme_lists_exactly_the_files_that_exist() -> None:
    assert sorted(readme_rows()) == FILES


def test_the_readme_has_one_table_per_data_set() -> None:
    sections = (CONFIGS / "README.md").read_text(encoding="utf-8").split("\n## ")[1:]
    folders = [{row.split("/")[0] for row in re.findall(r"^\| `(\S+/\S+)`", part, re.M)} for part in sections]
    assert sorted(folder for found in folders for folder in found) == DATA_SETS
    assert all(len(found) <= 1 for found in folders)


@every_file
def test_the_readme_quotes_the_figure_of_the_first_line(name: str) -> None:
    what, published, ours = readme_rows()[name]
    assert what
    assert ours
    if first_line(name).startswith("# Aims at no published figure"):
        assert published.startswith("none")
    else:
        assert figures(published)[0] == figures(first_line(name))[0]


@pytest.mark.parametrize("file", sorted((CONFIGS.parent / "tests" / "bench" / "methods").glob("*.yaml")))
def test_the_runs_of_the_results_page_have_one_budget(file: Path) -> None:
    config = config_file.load(file)
    assert config.model.backbone == "test_resnet"
    assert isinstance(config.optim, cfg.AdamW)
    assert (config.optim.batch, config.optim.lr) == (64, 1e-3)
    assert config.run.epochs == (20 if "photographs" in file.name else 24)
