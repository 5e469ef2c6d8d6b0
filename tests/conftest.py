"""Shared fixtures: devices to run on, and folders of real and made images."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Processors that add in another order round differently, and training amplifies this until curves differ. So
# use only instructions that every processor has; PyTorch reads these variables when it is loaded.
os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

import matplotlib
import numpy as np
import pytest
import torch
from by_hand import IMPORTED
from PIL import Image
from s3 import bucket, moto_server  # noqa: F401, fixtures

from dali_views import SampleIndex
from dali_views.tools.scenes import draw_scene

matplotlib.use("Agg")
# One process imports the trainer and is forked for each rank of a test; this takes a tenth of the time.
multiprocessing.set_forkserver_preload(IMPORTED)
# On a busy machine, threads wait for each other much longer than the tiny operators of tests take. And sums
# depend on the number of threads, while tests compare this process with others.
torch.set_num_threads(1)

# Real data sets may be beside the checkout; tests use them if they are.
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every test that asks for a device runs on both."""
    return str(request.param)


def on(device: str) -> torch.device:
    """PyTorch's name of a device of the loader."""
    return torch.device("cuda" if device == "gpu" else "cpu")


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    """Where there is a GPU, waiting for it is an error inside."""
    if device == "gpu":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "gpu":
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of cached scans; one for all tests, for forks have the first one's environment."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DALI_VIEWS_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _own_cache(_cache: Path) -> Iterator[None]:
    """No test finds what another test or a user has cached."""
    yield
    shutil.rmtree(_cache, ignore_errors=True)


def unpack(archive: str, folder: Path, most: int | None = None) -> Path:
    """Unpack (the first `most` files of) one of the real data sets."""
    with tarfile.open(REAL / archive) as tar:
        members = [member for member in tar if member.isfile()]
        tar.extractall(folder, members[:most], filter="data")
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder: matplotlib's sample portrait and 40 photographs of ImageNet, or scenes without them."""
    folder = tmp_path_factory.mktemp("photographs")
    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    (folder / "portrait.jpg").write_bytes(portrait.read_bytes())
    if (REAL / "imagenet-sample.tar").is_file():
        apart = unpack("imagenet-sample.tar", tmp_path_factory.mktemp("imagenet"), most=40)
        for file in apart.rglob("*.JPEG"):
            file.rename(folder / file.name)
    else:
        for number in range(16):
            scene = draw_scene(0, number, (280 + 8 * number, 340))
            Image.fromarray(scene.image).save(folder / f"scene-{number:02d}.jpg", quality=92)
    return folder


def noise_images(folder: Path, count: int, sizes: tuple[int, int] = (40, 72), seed: int = 0) -> Path:
    """`count` small JPEGs of different sizes whose pixels all differ."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for number in range(count):
        height, width = draw.integers(*sizes, size=2)
        coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(
            folder / f"{number:04d}.jpg", quality=90
        )
    return folder


def two_classes(folder: Path, count: int, sizes: tuple[int, int] = (40, 72)) -> Path:
    """`folder` with the classes ant and bee of `count` images each."""
    for seed, name in enumerate(("ant", "bee")):
        noise_images(folder / name, count, sizes, seed)
    return folder


@pytest.fixture(scope="session")
def small_index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """Forty small JPEGs."""
    return SampleIndex.from_folder(
        noise_images(tmp_path_factory.mktemp("small"), 40), cache=False, progress=False
    )
