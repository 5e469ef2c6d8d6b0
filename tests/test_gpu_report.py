"""The report of a GPU, at the small size that it has without one: parts by name, page, files, failures."""

from __future__ import annotations

import csv
import json
import os
from html import unescape
from pathlib import Path

import pytest
from conftest import noise_images

from dali_views.tools import cli, gpu_report
from dali_views.tools.cli import main
from trainers import cli as trainers_cli

PATIENT = ["--device", "cpu", "--minutes", "2000"]  # machines that run tests may be slow


def report(capsys, *words: object) -> tuple[int, dict[str, dict], str]:
    """Exit code, parts by name, and the page."""
    code = main(["gpu-report", *map(str, words), "--json"])
    facts = json.loads(capsys.readouterr().out)
    return code, {part["name"]: part for part in facts["parts"]}, Path(facts["page"]).read_text()


def test_parts_are_done_by_name_and_what_is_skipped_has_a_reason(tmp_path, capsys):
    code, parts, page = report(capsys, tmp_path / "out", "photos", *PATIENT, "--parts", "tests", "doctor")
    assert code == 0
    assert [(name, part["state"]) for name, part in parts.items()] == [
        ("doctor", "done"),
        ("tests", "skipped"),
    ]
    assert parts["tests"]["why"] == "CPU: no GPU"
    for words in ("CPU: no GPU", "decode on CPU", "DALI 2", 'class="skipped"'):
        assert words in page
    assert sorted(os.listdir(tmp_path / "out")) == ["doctor.log", "report.html"]
    assert main(["gpu-report", str(tmp_path), "--parts", "pixel"]) == 2
    assert "did you mean pixels?" in capsys.readouterr().err


def test_a_part_that_fails_costs_itself_and_its_error_is_on_the_page(tmp_path, capsys):
    parts = ["--parts", "pixels", "memory"]
    code, found, page = report(capsys, tmp_path / "out", tmp_path / "nowhere", *PATIENT, *parts)
    assert code == 1
    assert [part["why"] for part in found.values()] == ["ended with code 2"] * 2
    assert page.count("does not exist or is not a folder; check the path") == 2


def test_a_part_that_hangs_is_ended_and_without_time_none_is_begun(tmp_path, capsys, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import threading\nthreading.Event().wait()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = [tmp_path / "out", "photos", "--device", "cpu", "--minutes"]
    code, found, _ = report(capsys, *words, "0.06", "--parts", "memory")
    assert code == 1
    assert found["memory"]["why"] == "took longer than 4 s and was ended"
    code, found, _ = report(capsys, *words, "0.01", "--parts", "memory", "pixels")
    assert code == 0
    assert [part["why"] for part in found.values()] == ["no time left"] * 2


@pytest.mark.parametrize("device", ["gpu", "cpu"], ids=["with one", "without"])  # "gpu" would be skipped
def test_the_commands_of_all_parts_are_ones_that_exist_and_write_files_named_by_the_device(device, tmp_path):
    job = gpu_report.Job("photos", tmp_path, device, 10.0)
    parsers = {"dali_views": cli._parser(cli.COMMANDS), "trainers": trainers_cli._parser()}
    for name, part in gpu_report.PARTS.items():
        words = part.command(job)
        if name == "tests":
            assert words == "CPU: no GPU" if device == "cpu" else "gpu" in words
            continue
        args = parsers[words[1]].parse_args([*words[2:], *["--minutes", "1"] * part.timed])
        if name != "doctor":
            assert (args.csv, args.device) == (tmp_path / f"{device}_{name}.csv", device)
            assert args.images == ["photos"]


def test_pixels_that_depend_on_the_batch_fail_and_known_differences_between_decoders_do_not():
    rows = [
        {"name": "hw_decoder_load 0.65: views that depend on the batch size", "value": "12"},
        {"name": "hw_decoder_load 1.0: decoded images unlike those of hw_decoder_load 0", "value": "9"},
        {"name": "hw_decoder_load 1.0: views that depend on the batch size", "value": "0"},
    ]
    wrong = gpu_report.PARTS["pixels"].wrong
    assert wrong(rows) == ""
    assert wrong([*rows, {"name": "hw_decoder_load 1.0: differ while busy", "value": "1"}]).endswith("busy")


@pytest.mark.slow
def test_the_whole_report_has_figures_of_every_part_with_their_machine(tmp_path, capsys):
    code, parts, page = report(capsys, tmp_path, *PATIENT)
    assert code == 0, parts
    assert list(parts) == list(gpu_report.PARTS)
    assert [name for name, part in parts.items() if part["state"] != "done"] == ["tests"]
    for name in ("pixels", "loaders", "training", "memory", "methods", "guides"):
        with (tmp_path / f"cpu_{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows == parts[name]["rows"]
        assert all("DALI" in row["machine"] and row["device"] == "cpu" for row in rows if row["device"])
        assert all(row["name"] in unescape(page) for row in rows)
    methods = [row["name"] for row in parts["methods"]["rows"]]
    assert methods == [
        f"{name}, resnet18" for name in ("simclr", "moco", "byol", "simsiam", "dino", "scfs", "lejepa")
    ]
    assert parts["loaders"]["rows"][1]["name"] == "read only"
    noise_images(tmp_path / "photos", 12)
    code, parts, _ = report(capsys, tmp_path / "own", tmp_path / "photos", *PATIENT, "--parts", "pixels")
    assert (code, parts["pixels"]["rows"][-1]["measure"]) == (0, "of 12")
    assert sorted(os.listdir(tmp_path / "own")) == ["cpu_pixels.csv", "pixels.log", "report.html"]
