"""The same photographs in a folder, a list, shards, tables, LMDB and a bucket: byte-equal batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import pyarrow as pa
import pytest
from conftest import REAL, unpack
from s3 import Bucket
from tables import structs, write
from tars import pack_folder
from test_loader import Held, digest

from dali_views import RegionTable, SampleIndex, View, ViewLoader, recipes
from dali_views.tools.pack import pack_shards

VIEWS = [*recipes.moco_v2(32, crop="contrastive"), View(size=16, source="partner")]
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


def as_list(folder: SampleIndex, into: Path) -> SampleIndex:
    lines = [f"{name}\t{folder.classes[label]}\n" for name, _, label in rows(folder)]
    (into / "list.txt").write_text("".join(lines))
    return SampleIndex.from_list(into / "list.txt", folder.root, cache=False, progress=False)


def as_packed(folder: SampleIndex, into: Path) -> SampleIndex:
    pack_shards(folder, into / "packed", per_shard=150, progress=False)
    return SampleIndex.from_shards(into / "packed" / "*.tar", cache=False, progress=False)


def table_of(folder: SampleIndex) -> pa.Table:
    names, images, labels = zip(*rows(folder), strict=True)
    return pa.table({"image": structs(images, names), "label": [folder.classes[label] for label in labels]})


def as_parquet(folder: SampleIndex, into: Path) -> SampleIndex:
    table = table_of(folder)
    for number, start in enumerate(range(0, len(table), 200)):
        write(into / f"{number}.parquet", table.slice(start, 200), "parquet", 10)
    return SampleIndex.from_table(into / "*.parquet", cache=False, progress=False)


def as_arrow(folder: SampleIndex, into: Path) -> SampleIndex:
    file = write(into / "a.arrow", table_of(folder), "stream", 100)
    return SampleIndex.from_table(file, cache=False, progress=False)


def as_lmdb(folder: SampleIndex, into: Path) -> SampleIndex:
    with (
        lmdb.open(str(into / "a.lmdb"), map_size=1 << 30) as environment,
        environment.begin(write=True) as put,
    ):
        for name, image, _ in rows(folder):
            put.put(name.encode(), image)
    return SampleIndex.from_lmdb(into / "a.lmdb", cache=False, progress=False)


def as_source(folder: SampleIndex, into: Path) -> SampleIndex:
    names = [name for name, _, _ in rows(folder)]
    return SampleIndex.from_source(Held(folder), folder.labels, folder.classes, names=names, progress=False)


PLACES: list[Callable[[SampleIndex, Path], SampleIndex]] = [
    as_list, as_packed, as_parquet, as_arrow, as_lmdb, as_source,
]  # fmt: skip


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


@pytest.mark.parametrize("place", PLACES)
def test_the_batches_are_those_of_the_folder_also_when_resumed(place, folder, expected, tmp_path):
    index = place(folder, tmp_path)
    same(index, folder, expected)
    if place is not as_source:
        index.save(tmp_path / "index.safetensors")
        loaded = SampleIndex.load(tmp_path / "index.safetensors")
        assert [loaded.encoded(row) for row in (0, len(loaded) - 1)] == [
            folder.encoded(row) for row in (0, len(folder) - 1)
        ]


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
