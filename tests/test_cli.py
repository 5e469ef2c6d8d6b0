"""The loader's commands, as a user gives them."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import noise_images
from PIL import Image

import dali_views
from dali_views import RegionTable, SampleIndex
from dali_views.tools.cli import main


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return noise_images(tmp_path / "photos", 10)


def test_index_tells_what_is_usable_and_what_is_left_out(photos, capsys):
    (photos / "notes.jpg").write_text("no image")
    assert main(["index", str(photos)]) == 0
    told = capsys.readouterr().out
    assert "10 images" in told
    assert "notes.jpg" in told


def test_show_draws_the_boxes_and_crops_that_the_loader_uses(photos, tmp_path):
    pictures = []
    index = SampleIndex.from_folder(photos, progress=False)
    for name, box in (("left", [0.2, 0.0, 0.8, 0.3]), ("right", [0.2, 0.7, 0.8, 1.0])):
        regions = RegionTable(len(index), fingerprint=index.fingerprint)
        regions.update(np.arange(len(index)), np.tile(np.array(box, np.float32), (len(index), 1)))
        regions.save(tmp_path / "regions.safetensors")
        out = tmp_path / f"{name}.png"
        words = f"show {photos} --out {out} --device cpu --crop inside --count 3 --size 64 --regions"
        words += f" {tmp_path}/regions.safetensors"
        assert main(words.split()) == 0
        pictures.append(np.asarray(Image.open(out).convert("RGB")).astype(int))
    assert pictures[0].shape == pictures[1].shape
    assert np.abs(pictures[0] - pictures[1]).mean() > 1
    assert main([*words.split(), "--model", "resnet18"]) == 0
    assert Image.open(out).size[0] > pictures[0].shape[1]  # one more column, of heatmaps


def test_bench_measures_all_loaders_in_one_run_and_writes_them_down(photos, tmp_path):
    file = tmp_path / "bench.csv"
    arguments = ["--size", "32", "--batch-size", "4", "--workers", "1", "--rounds", "1", "--seconds", "0.1"]
    arguments += ["--only", "guided"]
    assert main(["bench", str(photos), "--device", "cpu", *arguments, "--csv", str(file)]) == 0
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["name"] for row in rows[:3]] == ["torchvision PIL", "decode only", "dali_views, guided"]
    assert [row["measure"] for row in rows] == ["images/s"] * 3 + ["of time"]
    assert all(float(row["value"]) > 0 and row["machine"] for row in rows)
    assert float(rows[0]["ratio"]) == 1.0


def test_help_and_indexing_need_neither_pytorch_nor_dali_and_every_public_name_is_there(photos):
    code = (
        "import sys, dali_views; from dali_views.tools.cli import COMMANDS, main\n"
        "words = [['--help'], ['index', sys.argv[1]], *([name, '--help'] for name in COMMANDS)]\n"
        "assert [main(each) for each in words] == [0] * len(words)\n"
        "assert not {'torch', 'nvidia.dali'} & sys.modules.keys()\n"
        "print(*(getattr(dali_views, name).__name__ for name in dali_views.__all__))"
    )
    command = [sys.executable, "-c", code, str(photos)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    told = run.stdout.splitlines()[-1]
    assert [name.rpartition(".")[2] for name in told.split()] == list(dali_views.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Loader'"):
        dali_views.Loader  # noqa: B018
