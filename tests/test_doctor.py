"""`dali-views doctor` under real conditions: what it must find, and that it always answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from conftest import noise_images

from dali_views.data.listing import EXTENSIONS
from dali_views.tools.cli import main
from dali_views.tools.doctor import examine as doctor
from dali_views.tools.doctor import lines as doctor_lines
from dali_views.tools.doctor import probes
from dali_views.tools.doctor.lines import GiB

ROOT = Path(__file__).resolve().parents[1]
# Machines that run tests may be far slower than one that is examined.
PATIENT = ["--timeout", "120"]
MACHINE = ["Python", "cores", "memory", "shared memory", "open files", "PyTorch", "DALI"]


def examined(*arguments: str, before: str = "", python: str = sys.executable, **environment: str) -> Any:
    """Exit code and lines by name of the command as a user runs it, after some shell commands."""
    command = [python, "-m", "dali_views", "doctor", "--json", *PATIENT, *arguments]
    shell = ["bash", "-c", f'{before}\nexec "$@"', "bash", *command]
    variables = {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(shell, env=os.environ | variables, cwd="/", capture_output=True, text=True)
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert told["ok"] == (done.returncode == 0)
    for line in told["lines"]:
        assert line.keys() == {"name", "state", "found", "mend"}
        assert line["state"] in ("ok", "note", "problem")
        assert line["found"]
        assert line["mend"] or line["state"] == "ok", line
    lines = {line["name"]: line for line in told["lines"]}
    assert len(lines) == len(told["lines"])
    return done.returncode, lines


def test_a_machine_that_runs_the_tests_is_told_to_be_well_and_every_question_has_a_line(
    tmp_path: Path,
) -> None:
    photos = noise_images(tmp_path / "photos", 30)
    before = {path: path.stat().st_mtime_ns for path in (photos, *photos.iterdir())}
    code, lines = examined("--data", str(photos))
    assert code == 0, [line for line in lines.values() if line["state"] == "problem"]
    for name in [*MACHINE, "together", "decode on CPU", "cache", "data", *doctor_lines.EXTRAS]:
        assert name in lines
    assert "GPU" in lines or "GPU 0" in lines
    assert "images/s of 2 KiB (30 read" in lines["data"]["found"]
    assert before == {path: path.stat().st_mtime_ns for path in (photos, *photos.iterdir())}


def test_a_health_check_imports_no_pytorch_and_reads_no_images(tmp_path: Path) -> None:
    # Whoever imports this PyTorch fails; its version can be read nevertheless.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "torch" / "version.py").write_text("__version__ = '9.9'\ncuda: Optional[str] = None\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    code, lines = examined("--quick", "--data", "nowhere", PYTHONPATH=path, CUDA_VISIBLE_DEVICES="")
    assert code == 0
    assert lines["decode on CPU"]["state"] == "ok"
    assert lines["PyTorch"]["found"] == "9.9, made without CUDA"
    assert not {"together", "data"} & lines.keys()
    code, lines = examined(PYTHONPATH=path, CUDA_VISIBLE_DEVICES="")
    assert code == 1
    assert lines["together"]["found"] == "RuntimeError: imported"


def test_without_a_gpu_a_run_can_start_on_the_cpu() -> None:
    code, lines = examined("--quick", CUDA_VISIBLE_DEVICES="")
    assert code == 0
    assert lines["GPU"]["state"] == "note"
    assert "decode on GPU" not in lines


def test_few_open_files_are_a_problem_and_so_few_that_hardly_anything_runs_is_still_told() -> None:
    _, lines = examined("--quick", before="ulimit -Sn 500")
    assert lines["open files"]["state"] == "note"
    assert lines["open files"]["mend"] == "ulimit -n 1024"
    code, lines = examined("--quick", before="ulimit -n 100")
    assert code == 1
    assert lines["open files"]["state"] == "problem"
    code, lines = examined("--quick", before="ulimit -n 7")
    assert code == 1
    assert "open files" in lines["decode on CPU"]["found"]


def test_a_cache_folder_that_cannot_be_written_costs_a_note_and_a_writable_one_is_left_as_it_was(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    code, lines = examined("--quick", DALI_VIEWS_CACHE=str(tmp_path / "file" / "cache"))
    assert code == 0
    assert lines["cache"]["state"] == "note"
    assert "DALI_VIEWS_CACHE" in lines["cache"]["mend"]
    _, lines = examined("--quick", DALI_VIEWS_CACHE=str(tmp_path / "new" / "cache"))
    assert lines["cache"]["state"] == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_another_user_cannot_be_written(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can take another user's place")
    imports = "import os, sys; from dali_views.tools.doctor.probes import cache"
    code = f"{imports}\nos.seteuid(65534)\ncache(sys.argv[1])"
    (tmp_path / "mine").mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    command = [sys.executable, "-c", code, str(tmp_path / "mine")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "PermissionError" in done.stderr


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "no image"),
        (lambda path: path.touch(), "no image"),
    ],
)
def test_images_that_are_not_there_are_a_problem(tmp_path: Path, make: Any, word: str) -> None:
    make(tmp_path / "photos")
    line = doctor._data("photos", doctor.Probe("data", str(tmp_path / "photos")).answer(1e9))
    assert line.state == "problem"
    assert word in line.found


def test_a_shard_is_read_at_even_places(tmp_path: Path) -> None:
    (tmp_path / "images.tar").write_bytes(bytes(1_000_000))
    answer = doctor.Probe("data", str(tmp_path / "images.tar")).answer(1e9)
    assert answer["bytes"] == 1_000_000
    assert answer["images"] == 8


@pytest.mark.parametrize(
    ("does", "told"), [("os.abort()", "crashed (SIGABRT)"), ("time.sleep(1000)", "no answer in time")]
)
def test_what_crashes_or_hangs_is_a_line_of_its_own(tmp_path: Path, does: str, told: str) -> None:
    (tmp_path / "PIL").mkdir()
    (tmp_path / "PIL" / "__init__.py").write_text(f"import os, time; {does}")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    code, lines = examined("--quick", *(["--timeout", "4"] if "sleep" in does else []), PYTHONPATH=path)
    assert code == 1
    assert lines["decode on CPU"]["found"].startswith(told)


def test_a_package_that_is_missing_is_told_with_what_it_is_for(tmp_path: Path) -> None:
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(("timm", "nvidia_dali_cuda120")):
            (tmp_path / entry.name).symlink_to(entry)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    command = [sys.executable, "-S", "-m", "dali_views", "doctor", "--json", "--quick", *PATIENT]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    lines = {line["name"]: line for line in json.loads(done.stdout)["lines"]}
    assert lines["timm"]["state"] == "note"
    assert lines["timm"]["mend"] == "pip install timm"
    assert lines["PyTorch"]["state"] == "ok"
    assert lines["DALI"]["state"] == "problem"
    assert done.returncode == 1


@pytest.mark.parametrize(("cuda", "state"), [("99.0", "ok"), ("11.8", "problem")])
def test_a_driver_older_than_what_pytorch_or_dali_was_made_for_is_a_problem(cuda: str, state: str) -> None:
    gpu = {"name": "GPU of a test", "bytes": 8 * GiB, "capability": "9.0"}
    found = list(doctor._versions({"driver": {"cuda": cuda, "gpus": [gpu]}}, device=True))
    by_name = {line.name: line for line in found}
    assert by_name["DALI"].state == state
    assert by_name["GPU 0"].found == "GPU of a test, 8 GiB, compute capability 9.0"


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({"cpu.max": "150000 100000", "memory.max": "1000"}, 1.5, 1000),
        ({"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        ({}, None, None),
    ],
)
def test_the_limits_of_a_container_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Any, cores: float | None, memory: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(doctor_lines, "_cgroups", lambda controller: [tmp_path / "own", tmp_path])
    assert list(doctor_lines._quotas()) == ([] if cores is None else [cores])
    assert list(doctor_lines._memory_limits()) == ([] if memory is None else [memory])


def test_the_command_line_of_the_other_commands_has_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--quick", *PATIENT])
    told = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok ", "note ", "problem ")) for line in told[:-1])
    assert told[-1].endswith("problems" if code == 0 else "problem")


def test_the_images_whose_reading_is_measured_are_those_that_are_indexed():
    assert probes._SUFFIXES == EXTENSIONS
