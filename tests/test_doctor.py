"""`dali-views doctor` under real conditions: what it must find, and that it always answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import noise_images

from dali_views.tools import doctor
from dali_views.tools.cli import main

ROOT = Path(__file__).resolve().parents[1]
# Machines that run tests may be far slower than one that is examined.
PATIENT = ["--timeout", "120"]


def examined(*arguments, before="", python=(), path="", **variables):
    """Exit code and lines by name of the command as a user runs it, after some shell commands."""
    command = [sys.executable, *python, "-m", "dali_views", "doctor", "--json", *PATIENT, *arguments]
    shell = ["bash", "-c", f'{before}\nexec "$@"', "bash", *command]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)])), **variables}
    done = subprocess.run(shell, env=variables, cwd="/", capture_output=True, text=True)
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert told["ok"] == (done.returncode == 0)
    for line in told["lines"]:
        assert line.keys() == {"name", "state", "found", "fix"}
        assert line["state"] in ("ok", "note", "problem")
        assert line["found"]
        assert line["fix"] or line["state"] == "ok", line
    return done.returncode, {line["name"]: line for line in told["lines"]}


def package(folder: Path, name: str, code: str) -> str:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    return str(folder)


def test_a_machine_that_runs_the_tests_is_well_and_every_question_has_a_line(tmp_path):
    photos = noise_images(tmp_path / "photos", 30)
    before = {path: path.stat().st_mtime_ns for path in (photos, *photos.iterdir())}
    code, lines = examined("--data", str(photos))
    assert code == 0, [line for line in lines.values() if line["state"] == "problem"]
    names = ["Python", "cores", "memory", "shared memory", "open files", "GPU", *doctor.PACKAGES]
    assert lines.keys() >= {*names, "together", "decode on CPU", "cache", "data"}
    assert "images/s of 2 KiB (30 read" in lines["data"]["found"]
    assert before == {path: path.stat().st_mtime_ns for path in (photos, *photos.iterdir())}


def test_a_health_check_imports_no_pytorch_and_reads_no_images(tmp_path):
    path = package(tmp_path, "torch", "raise RuntimeError('imported')")
    code, lines = examined("--quick", "--data", "nowhere", path=path)
    assert code == 0
    assert lines["decode on CPU"]["state"] == "ok"
    assert not {"together", "data"} & lines.keys()
    code, lines = examined(path=path)
    assert (code, lines["together"]["found"]) == (1, "RuntimeError: imported")


def test_few_open_files_are_a_problem_and_so_few_that_hardly_anything_runs_is_still_reported():
    _, lines = examined("--quick", before="ulimit -Sn 500")
    assert (lines["open files"]["state"], lines["open files"]["fix"]) == ("note", "ulimit -n 1024")
    code, lines = examined("--quick", before="ulimit -n 7")
    assert (code, lines["open files"]["state"]) == (1, "problem")
    assert "open files" in lines["decode on CPU"]["found"]


def test_a_cache_folder_that_cannot_be_written_is_a_note_and_a_writable_one_is_left_as_it_was(tmp_path):
    (tmp_path / "file").touch()
    code, lines = examined("--quick", DALI_VIEWS_CACHE=str(tmp_path / "file" / "cache"))
    assert (code, lines["cache"]["state"]) == (0, "note")
    assert "DALI_VIEWS_CACHE" in lines["cache"]["fix"]
    _, lines = examined("--quick", DALI_VIEWS_CACHE=str(tmp_path / "new" / "cache"))
    assert lines["cache"]["state"] == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_images_that_are_not_there_are_a_problem_and_a_shard_is_read_in_pieces(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "shard").write_bytes(bytes(1_000_000))
    (shard,) = doctor._tried(["data"], str(tmp_path / "shard"), 120)
    assert "(8 read" in shard.found
    for place in ("none", "empty"):
        (line,) = doctor._tried(["data"], str(tmp_path / place), 120)
        assert (line.state, "no image" in line.found) == ("problem", True)


@pytest.mark.parametrize(
    ("does", "told"), [("os.abort()", "crashed (SIGABRT)"), ("time.sleep(1000)", "no answer in time")]
)
def test_what_crashes_or_hangs_costs_its_own_line_and_not_those_before(tmp_path, does, told):
    path = package(tmp_path, "PIL", f"import os, time; {does}")
    code, lines = examined("--quick", *(["--timeout", "4"] if "sleep" in does else []), path=path)
    assert code == 1
    assert lines["decode on CPU"]["found"] == told
    assert lines["cache"]["state"] == "ok"
    assert (lines["GPU"]["found"] == told) == ("sleep" in does)


def test_packages_that_are_missing_are_named_also_without_numpy(tmp_path):
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(("timm", "numpy", "nvidia_dali_cuda120")):
            (tmp_path / entry.name).symlink_to(entry)
    code, lines = examined("--quick", python=("-S",), path=str(tmp_path))
    states = [lines[name]["state"] for name in ("timm", "PyTorch", "DALI")]
    assert (code, *states, lines["timm"]["fix"]) == (1, "note", "ok", "problem", "pip install timm")
    assert "numpy" in lines["decode on CPU"]["found"]


def test_a_driver_older_than_what_dali_is_made_for_is_a_problem(tmp_path):
    program = tmp_path / "nvidia-smi"
    for driver, state in (("570.1", "ok"), ("450.2.1", "problem")):
        program.write_text(f"#!/bin/sh\necho 'GPU of a test, 8192 MiB, 9.0, {driver}'\n")
        program.chmod(0o755)
        _, lines = examined("--quick", PATH=f"{tmp_path}:{os.environ['PATH']}")
        assert (lines["GPU"]["state"], lines["GPU"]["found"][-len(driver) :]) == (state, driver)


def test_the_limits_of_all_cgroups_above_are_read(tmp_path):
    files = {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000", "memory.max": "1000"}
    for name, text in files.items():
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_text(text + "\n")
    (tmp_path / "own").write_text("0::/job/step\n")
    for file, limits in (("cpu.max", [["150000", "100000"]]), ("memory.max", [["1000"]]), ("pids.max", [])):
        assert list(doctor._limits(file, str(tmp_path / "own"), str(tmp_path / "top"))) == limits


def test_the_table_has_a_line_for_each_finding_and_ends_with_the_number_of_problems(capsys):
    assert main(["doctor", "--quick", *PATIENT]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok ", "note ")) for line in lines)
    assert last == "no problems"
