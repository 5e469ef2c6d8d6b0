"""`trainers bench`: figures of the training loop itself; a run that fails costs itself."""

from __future__ import annotations

import csv

from conftest import noise_images

from trainers.cli import main


def test_runs_of_methods_and_guides_are_measured_and_one_that_fails_is_named(tmp_path, capsys):
    images, file = noise_images(tmp_path / "images", 6), tmp_path / "bench.csv"
    words = ["bench", str(images), "--device", "cpu", "--size", "32", "--batch-size", "4", "--steps", "2"]
    words += ["--methods", "simclr", "--guides", "none", "online_crop", "--csv", str(file)]
    assert main([*words, "--backbones", "resnet9999", "resnet10"]) == 1
    told = capsys.readouterr().out
    assert told.count("failed: simclr, resnet9999") == 2
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["name"] for row in rows] == ["simclr, resnet10", "simclr, resnet10, online_crop"]
    assert all(float(row["value"]) > 0 and row["measure"] == "images/s" for row in rows)
    assert (rows[0]["images"], rows[0]["steps"], rows[0]["batch_size"]) == ("6", "2", "4")
    assert main([*words, "--backbones", "resnet10", "--minutes", "0"]) == 0
    assert "left out: simclr, resnet10, online_crop (no time left)" in capsys.readouterr().out
