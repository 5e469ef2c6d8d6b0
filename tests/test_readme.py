"""The README's code runs as printed, and its table is the committed file's."""

from __future__ import annotations

import csv
import re
import runpy
from pathlib import Path

import pytest
import torchvision
from conftest import noise_images

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_the_example_of_reuse_runs_as_printed(readme, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    noise_images(tmp_path / "photos", 12)
    monkeypatch.chdir(tmp_path)
    model = torchvision.models.resnet18(num_classes=8)
    names = {"model": model, "your_loss": lambda a, b, w: ((a - b).square().mean(1) * w).mean()}
    exec(compile(code, "README.md", "exec"), names)
    assert (names["regions"].writes == 2).all()
    assert names["loss"].isfinite()


def test_the_tables_of_speed_are_the_committed_files():
    for page in ("README.md", "docs/speed.md", "docs/sources.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for path in re.findall(r"<!-- table: (\S+) -->", text):
            with (ROOT / path).open() as file:
                assert len(list(csv.DictReader(file))) > 2
    main = runpy.run_path(str(ROOT / "tests/bench/tables.py"))["main"]
    assert main(["--check"]) == 0, "run make tables"


def test_the_messages_of_the_readme_are_those_of_the_code(readme):
    table = readme.split("## When a message stops you")[1].split("\n## ")[0]
    code = "".join(
        file.read_text() for part in ("dali_views", "trainers") for file in (ROOT / part).rglob("*.py")
    )
    told = re.sub(r'"\s*f?"', "", code)  # sentences of several lines
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 10
    for row in rows:
        for words in re.findall("`([^`]+)`", row):
            assert words in told, words


def test_every_file_the_readme_points_to_exists(readme):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", readme):
        assert (ROOT / target).exists(), target


def test_the_results_page_quotes_the_committed_numbers() -> None:
    with (ROOT / "tests/bench/results/cpu_methods_cifar10.csv").open() as file:
        committed = [
            [f"{100 * float(row[key]):.1f}" for key in ("knn20_top1", "knn200_top1", "linear_top1")]
            for row in csv.DictReader(file)
        ]
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8").split("## DINO against")[0]
    told = [[cell.strip() for cell in line.split("|")[2:5]] for line in page.splitlines() if "|" in line]
    quoted = [cells for cells in told if cells[0].replace(".", "").isdigit() and cells[0] != "10.0"]
    assert quoted == committed
