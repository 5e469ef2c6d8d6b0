"""The configurations that come with the project: each loads, fits together and says what it aims at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from trainers import config as cfg
from trainers import config_file
from trainers.backbones import build_backbone
from trainers.data import training_views
from trainers.methods import build_method

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
GUIDED = [name for name in FILES if name.endswith("ccrop.yaml")]
FIGURE = re.compile(r"(?<![\d.:])\d+\.\d+(?!\d|:)")
every_file = pytest.mark.parametrize("name", FILES)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads on a busy machine wait for each other far longer than these tiny operators take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@every_file
def test_it_loads_and_its_views_can_be_built(name: str) -> None:
    config = config_file.load(CONFIGS / name)
    views = training_views(config.views)
    assert len(views) == 2, "SimCLR and MoCo compare two views"
    assert {(view.size, view.crop) for view in views} == {(config.views.size, config.views.crop)}
    if config.views.scale is not None:
        assert {view.scale for view in views} == {config.views.scale}


@every_file
def test_its_run_folder_is_its_own_name_and_its_paths_are_relative(name: str) -> None:
    config = config_file.load(CONFIGS / name)
    if name != "demo.yaml":  # whose run folder is one of two arms
        assert config.run.out == f"runs/{name.removesuffix('.yaml')}"
    paths = [config.run.out, *filter(None, (config.data.path, config.data.instances, config.data.eval_val))]
    assert not any(Path(path).is_absolute() for path in paths)


@every_file
def test_crops_follow_the_boxes_if_and_only_if_somebody_writes_boxes_in_time(name: str) -> None:
    config = config_file.load(CONFIGS / name)
    assert (config.views.crop in ("contrastive", "inside")) == (config.guide.name != "none")
    if isinstance(config.guide, cfg.ContrastiveCrop):
        assert config.guide.warmup % config.guide.interval == 0, "boxes would be later than the warm-up says"
        assert config.guide.warmup < config.run.epochs


@pytest.mark.parametrize("name", GUIDED)
def test_a_guided_arm_differs_from_its_base_in_crops_and_guide_alone(name: str) -> None:
    path = CONFIGS / name
    base = path.parent / yaml.safe_load(path.read_text(encoding="utf-8"))["base"]
    changed = config_file.differences(config_file.load(path), config_file.load(base))
    assert {"run.out", "views.crop", "guide.name"} <= set(changed)
    assert all(
        key in ("run.out", "views.crop", "views.alpha") or key.startswith("guide.") for key in changed
    ), changed


@pytest.mark.usefixtures("one_thread")
@torch.no_grad()
def test_every_distinct_network_and_method_fit_and_give_a_loss_per_sample() -> None:
    loaded = [config_file.load(CONFIGS / name) for name in FILES]
    for model, method in {(config.model, config.method) for config in loaded}:
        network = build_method(method, build_backbone(model.backbone, model.stem))
        # Tiny, yet divisible by every split_bn; sizes do not change what fits, for the pooling is global.
        losses = network([torch.rand(8, 3, 16, 16), torch.rand(8, 3, 16, 16)])
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


@every_file
def test_the_readme_quotes_the_figure_of_the_first_line(name: str) -> None:
    what, published, ours = readme_rows()[name]
    assert what
    assert ours
    if first_line(name).startswith("# Aims at no published figure"):
        assert published.startswith("none")
    else:
        assert figures(published)[0] == figures(first_line(name))[0]
