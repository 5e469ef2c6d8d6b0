"""What is installed without a checkout is whole: types, configurations, the demonstration."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["dali_views", "trainers", "configs", "pyproject.toml", "README.md", "LICENSE"]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
DEMO = """
from trainers.config import file as config_file
from trainers import demo
paths = ["run.out=out", "data.path=images", "data.instances=instances.json"]
names = [config_file.load(file, paths).guide.name for file in (demo.CONFIG, "configs/demo.yaml")]
print(*names, demo.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    subprocess.run(["cp", "-a", *PARTS, source], cwd=ROOT, check=True)
    command = [sys.executable, "-W", "ignore", "-c", BUILD, folder]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_a_wheel_has_types_and_all_configurations(installed):
    for package in ("dali_views", "trainers"):
        assert (installed / package / "py.typed").is_file()
    for file in (ROOT / "configs").rglob("*.yaml"):
        copied = installed / "trainers" / "configs" / file.relative_to(ROOT / "configs")
        assert copied.read_bytes() == file.read_bytes()
    kinds = {path.suffix for path in installed.rglob("*") if path.is_file() and "dist-info" not in str(path)}
    assert kinds == {".py", ".typed", ".yaml", ".html"}


def test_the_demonstration_has_its_configuration_in_a_wheel(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DEMO],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["contrastive_crop"] * 2 + [str(installed / "trainers" / "demo.py")], (
        done.stderr
    )
