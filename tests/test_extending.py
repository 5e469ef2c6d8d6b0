"""What docs/extending.md prints does what it says: the recipe makes views, the configuration trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from conftest import noise_images

from dali_views import recipes
from dali_views.tools import cli as loader_cli
from trainers import cli as trainer_cli
from trainers.engine import checkpoint

PAGE = (Path(__file__).resolve().parents[1] / "docs/extending.md").read_text(encoding="utf-8")


def printed(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return block


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder but for photographs and the page's configuration, without a validation set."""
    noise_images(tmp_path / "photos", 70)
    (tmp_path / "mine.yaml").write_text(printed("yaml"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_is_shown_and_trained_on(place, monkeypatch):
    scope = dict(vars(recipes))
    exec(compile(printed("python"), "docs/extending.md", "exec"), scope)
    (name,) = set(scope) - set(vars(recipes))
    monkeypatch.setitem(recipes.BY_NAME, name, scope[name])
    show = ["show", "photos", "--recipe", name, "--device", "cpu", "--out", "views.html"]
    monkeypatch.setattr("sys.argv", ["dali-views", *show])
    assert loader_cli.main() == 0
    assert (place / "views.html").is_file()
    small = [f"views.name={name}", "views.local_size=16", "method.name=dino", "method.output_dim=64"]
    assert trainer_cli.main(["pretrain", "mine.yaml", *small]) == 0
    assert checkpoint.load(place / "runs" / "mine")["step"] == 2


def test_the_configuration_trains_as_printed(place):
    assert trainer_cli.main(["pretrain", "mine.yaml"]) == 0
    assert checkpoint.load(place / yaml.safe_load(printed("yaml"))["run"]["out"])["step"] == 2
