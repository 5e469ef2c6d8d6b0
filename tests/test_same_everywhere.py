"""The same photographs in a folder and in a bucket: byte-equal batches. See also test_properties."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REAL, unpack
from s3 import Bucket
from tars import pack_folder
from test_loader import digest

from dali_views import RegionTable, SampleIndex, View, ViewLoader, recipes

VIEWS = [*recipes.moco_v2(32, crop="contrastive"), View(size=16, partner=True)]
BATCH = 64


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """500 photographs of ImageNet in two class folders where at hand, else the few that there are."""
    folder = tmp_path_factory.mktemp("classes")
    apart = unpack("imagenet-sample.tar", tmp_path_factory.mktemp("all")) if REAL.is_dir() else photographs
    files = sorted(file for file in apart.rglob("*") if file.is_file())
    for number, file in enumerate(files):
        place = folder / ("left" if 2 * number < len(files) else "right") / file.with_suffix(".jpg").name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def folder(photos: Path) -> SampleIndex:
    return SampleIndex.from_folder(photos, cache=False, progress=False)


@pytest.fixture(scope="module")
def expected(folder: SampleIndex) -> list[str]:
    return [digest(batch) for batch in loader_of(folder)]


def rows(folder: SampleIndex) -> Iterator[tuple[str, bytes, int]]:
    """Name below the root, bytes and label of every photograph."""
    for row, label in enumerate(folder.labels.tolist()):
        yield str(Path(folder.path(row)).relative_to(folder.root)), folder.encoded(row), label


def loader_of(index: SampleIndex) -> ViewLoader:
    """Guided, with partners, in the second epoch; the same for all."""
    regions = RegionTable(len(index))
    every = range(len(index))
    boxes = [[0.1, 0.2, 0.6 + 0.3 * row / len(index), 0.9] for row in every]
    regions.update(every, boxes, partner=every[::-1])
    loader = ViewLoader(index, VIEWS, min(BATCH, len(index) // 4), device="cpu", regions=regions, seed=7)
    loader.set_epoch(1)
    return loader


def same(index: SampleIndex, folder: SampleIndex, expected: list[str]) -> None:
    """The same sizes, labels and batches, also of a loader that continues another in mid-epoch."""
    assert (index.sizes == folder.sizes).all()
    assert (index.labels.tolist(), index.classes) == (folder.labels.tolist(), folder.classes)
    loader = loader_of(index)
    half = len(expected) // 2
    for number, batch in enumerate(loader):
        assert digest(batch) == expected[number]
        if number + 1 == half:
            break
    resumed = loader_of(index)
    resumed.load_state_dict(loader.state_dict())
    assert [digest(batch) for batch in resumed] == expected[half:]


def test_a_bucket_gives_the_batches_of_the_folder(folder, expected, bucket: Bucket):
    for name, image, _ in rows(folder):
        bucket.put(f"train/{name}", image)
    same(SampleIndex.from_folder(bucket.url("train"), cache=False, progress=False), folder, expected)


def test_shards_in_a_bucket_give_the_batches_of_the_folder_also_where_they_are_kept(
    folder, expected, bucket: Bucket, tmp_path
):
    pack_folder(Path(folder.root), tmp_path / "shards", 3)
    for file in (tmp_path / "shards").iterdir():
        bucket.put(f"shards/{file.name}", file.read_bytes())
    url = bucket.url("shards/part-{000..002}.tar")
    shards = SampleIndex.from_shards(url, cache=False, progress=False)
    same(shards.cached(tmp_path / "kept", 1), folder, expected)
