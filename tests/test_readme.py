"""The README's code runs as printed, and its table is the committed file's."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

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


@pytest.fixture
def tables() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "tests/bench/tables.py")))


def test_the_tables_of_figures_are_the_committed_files(tables, capsys):
    assert tables.main(["--check"]) == 0, "run make tables"
    assert capsys.readouterr().err == "", "a page shows no table that has no file yet"
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    typed = re.sub(r"<!-- table: .*?<!-- end -->", "", page, flags=re.DOTALL)
    assert not re.search(r"^\|", typed, re.MULTILINE), "a table of results needs a file"


def test_a_comparison_subtracts_seed_by_seed_and_takes_in_the_files_that_exist(
    tables, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(tables.table.__globals__, "ROOT", tmp_path)
    assert tables.table("cpu_*_new.csv") == ""
    assert "cpu_*_new.csv" in capsys.readouterr().err
    runs = "untrained,0,.2,\nrandom,0,.3,\nrandom,1,.5,\nonline,0,.32,.4\nonline,1,.51,.6\nccrop,1,.4,\n"
    (tmp_path / "cpu_simclr_new.csv").write_text(f"config,seed,knn_top1,guide_iou\n{runs}")
    rows = [
        ["", "kNN top-1 %", "difference", "IoU of its boxes"],
        ["untrained", "20.00 (1 of 2 seeds)", "", ""],
        ["none: random crops", "40.00 (30.00, 50.00)", "", ""],
        ["`online_crop`", "41.50 (32.00, 51.00)", "+1.50 (+2.00, +1.00)", "0.500"],
        ["`contrastive_crop`", "40.00 (1 of 2 seeds)", "-10.00", ""],
    ]
    assert _cells(tables.table("cpu_*_new.csv")) == rows
    (tmp_path / "cpu_moco_new.csv").write_text(
        "config,seed,knn_top1,guide_iou\nrandom,0,.1,\nsaliency,0,.2,\n"
    )
    first, *_, last = _cells(tables.table("cpu_*_new.csv", "random"))
    assert first[4:] == ["kNN top-1 %, MoCo v2", "difference, MoCo v2"]
    assert last == ["`saliency`", "", "", "", "20.00", "+10.00"]
    with pytest.raises(ValueError, match="no run is of truth"):
        tables.table("cpu_*_new.csv", "truth")


def test_files_of_gpus_stand_under_their_machines_and_a_sentence_where_there_is_none(
    tables, tmp_path, monkeypatch
):
    monkeypatch.setitem(tables.table.__globals__, "ROOT", tmp_path)
    page = "<!-- gpu table: gpu_loaders*.csv -->\nold\n<!-- end -->\n"
    page += "<!-- gpu table: gpu_memory*.csv -->\n<!-- end -->\n"
    assert tables.rendered(page).count("Not yet measured on a GPU.\n<!-- end -->") == 2
    head = "part,name,measure,value,ratio,of_limit,kind,views,size,batch_size,machine\n"
    for gpu, rate in (("", 9000), ("_b", 7000)):
        row = f'loaders,decode only,images/s,{rate},10,1,limit,0,224,256,"16 cores, GPU{gpu}"\n'
        (tmp_path / f"gpu_loaders{gpu}.csv").write_text(head + row)
    (tmp_path / "gpu_memory.csv").write_text(
        head + "memory,peak on the device,MiB,2048,,,ours,0,224,64,one GPU\n"
    )
    first, second, third, last = tables.rendered(page).split(" pixels:\n")
    assert first.endswith("-->\n16 cores, GPU; batch 256, 224")
    assert ["decode only", "9000", "", "10.00", "1.00"] in _cells(second)
    assert "16 cores, GPU_b; batch 256" in second
    assert "one GPU; batch 64" in third
    assert last.endswith("| peak on the device | 2048 | MiB |\n<!-- end -->\n")
    assert tables.rendered(tables.rendered(page)) == tables.rendered(page)


def _cells(table: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return rows[:1] + rows[2:]


def test_the_messages_that_are_explained_are_those_of_the_code():
    page = (ROOT / "docs/failures.md").read_text(encoding="utf-8")
    table = page.split("## When a message stops you")[1].split("\n## ")[0]
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
