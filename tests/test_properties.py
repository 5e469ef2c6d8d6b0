"""Whatever divides, stops, resumes or stores a run: each sample of an epoch is that of the plain run.

The plain run reads a folder on one rank with one thread, one image at a time. Hypothesis draws what a run
sees (`Run`) and how it comes by it (`Part`, a place), the same examples in every process.
`EXAMPLES=1000 pytest tests/test_properties.py` draws more of them.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
import pyarrow as pa
import pytest
from conftest import noise_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tables import structs, write
from tars import pack_folder
from test_loader import Held

from dali_views import RegionTable, SampleIndex, View, ViewLoader, recipes
from dali_views.graph import build, feed
from dali_views.plan.views import GUIDED
from dali_views.tools.pack import pack_shards

EXAMPLES = int(os.environ.get("EXAMPLES", 40))
IMAGES = 12
QUIET = {"cache": False, "progress": False}


class Sample(NamedTuple):
    """All that a batch says of one sample; arrays as bytes, pixels as a checksum of each view."""

    row: int
    label: int
    partner: int
    weight: float
    box: bytes
    crops: bytes
    flipped: bytes
    rotated: bytes
    pixels: tuple[int, ...]


def samples(batch: Any) -> list[Sample]:
    numbers = [getattr(batch, name).tolist() for name in ("index", "label", "partner", "weights")]
    pixels = [[zlib.crc32(view[b].contiguous().numpy()) for view in batch.views] for b in range(len(batch))]
    arrays = [getattr(batch, name) for name in ("boxes", "crops", "flipped", "rotated")]
    parts = [[row.numpy().tobytes() for row in array] for array in arrays]
    return [Sample(*rest, tuple(views)) for *rest, views in zip(*numbers, *parts, pixels, strict=True)]


@dataclass(frozen=True)
class Run:
    """What decides the samples of its epochs."""

    views: tuple[View, ...]
    seed: int
    epoch: int
    shuffle: bool
    dtype: str
    regions: int  # K; 0 is a run without a table
    rows: tuple[int, ...]  # of the subset

    def table(self, number: int) -> RegionTable | None:
        """The region table at the start of an epoch: some rows without boxes, some weights zero."""
        if not self.regions:
            return None
        count, draw = len(self.rows), np.random.default_rng([self.regions, number])
        low = draw.uniform(0, 0.6, (count, self.regions, 2))
        boxes = np.concatenate([low, low + draw.uniform(0.01, 0.4, low.shape)], axis=2)
        weights = draw.choice([0, 0.25, 3], (count, self.regions))
        weights[np.arange(count), draw.integers(self.regions, size=count)] = 0.5
        table = RegionTable(count, self.regions)
        table.update(range(count), weights=weights, partner=draw.integers(count, size=count))
        written = np.flatnonzero(draw.random(count) < 0.8)
        table.update(written, boxes[written])
        return table

    def loader(self, index: SampleIndex, batch: int, number: int, **options: Any) -> ViewLoader:
        decided = {"seed": self.seed, "shuffle": self.shuffle, "dtype": self.dtype, "device": "cpu"}
        loader = ViewLoader(index, self.views, batch, regions=self.table(number), **decided, **options)
        loader.set_epoch(self.epoch + number)
        return loader


@dataclass(frozen=True)
class Part:
    """What a run does between two stops. It decides who makes a sample and when."""

    batch: int
    world: int
    threads: int
    drop_last: bool
    steps: int  # until the stop; the last part of an epoch has no other end
    teller: int  # rank whose state the next part loads
    anew: bool  # whether other loaders go on, or those of the part before


@st.composite
def some_views(draw: Callable[..., Any]) -> tuple[View, ...]:
    """A recipe; for some, with views more: of the partner, inside a view, a view's twin."""
    name = draw(st.sampled_from(sorted(recipes.BY_NAME)))
    options: dict[str, Any] = {}
    if name not in ("evaluation", "localisation"):
        crop = st.sampled_from(["random", *GUIDED])
        options = {"crop": draw(crop), "second_crop": draw(crop)}
        options["joint"] = draw(st.sampled_from([None, 0, 2]))
        options |= {"vflip": draw(st.sampled_from([0, 0.5])), "rotate90": draw(st.sampled_from([0, 0.75]))}
        if {options["crop"], options["second_crop"]} <= {*GUIDED}:
            options["dilate"] = (1.0, draw(st.sampled_from([1.0, 1.5])))
    if name == "dino":
        options |= {"locals": 2, "local_size": 5, "local_crop": draw(crop)}
    views = recipes.BY_NAME[name](draw(st.integers(6, 9)), **options)
    partner = View(size=6, partner=True, crop=draw(st.sampled_from(["random", *GUIDED])))
    views += [View(size=6, within=0, flip=0.5, blur=0.5), View(size=5, twin_of=0)] * draw(st.integers(0, 1))
    return (*views, *[partner] * draw(st.integers(0, 1)))


SUBSETS = st.permutations(range(IMAGES)) | st.lists(st.integers(0, IMAGES - 1), min_size=1, unique=True)
RUNS = st.builds(
    Run,
    views=some_views(),
    seed=st.integers(-3, 2**40),
    epoch=st.integers(0, 1000),
    shuffle=st.sampled_from([True, True, False]),
    dtype=st.sampled_from(["float32", "float16"]),
    regions=st.integers(0, 3),
    rows=SUBSETS.map(tuple),
)
PARTS = st.builds(
    Part,
    batch=st.integers(1, 5),
    world=st.integers(1, 3),
    threads=st.integers(1, 3),
    drop_last=st.booleans(),
    steps=st.integers(0, 3),
    teller=st.integers(0, 2),
    anew=st.booleans(),
)
EPOCHS = st.lists(st.lists(PARTS, min_size=1, max_size=3), min_size=1, max_size=2)


def plain(folder: SampleIndex, run: Run, number: int) -> list[Sample]:
    """The samples of an epoch in order. Each is there once, with the label and the region of its row."""
    loader = run.loader(folder, 1, number, rank=0, world=1, threads=1)
    table = loader.regions or RegionTable(len(folder))
    seen = [sample for batch in loader for sample in samples(batch)]
    order = [sample.row for sample in seen]
    assert (sorted(order) if run.shuffle else order) == list(range(len(folder)))
    for row, label, partner, weight, box, *_ in seen:
        assert folder.classes[label] == Path(folder.path(row)).parent.name
        regions = zip(table.weights[row].tolist(), table.boxes[row], strict=True)
        assert (weight, box) in [(other, one.tobytes()) for other, one in regions if other > 0]
        assert partner == table.partner[row]
    return seen


def follow(index: SampleIndex, run: Run, epochs: list[list[Part]], wanted: list[list[Sample]]) -> None:
    """Go through the epochs part by part; every global batch has the samples `wanted` there.

    While an epoch runs, its table becomes that of the next one: nobody sees this before.
    """
    count, loaders, part = len(index), [], None
    for number, parts in enumerate(epochs):
        position = 0
        for place, new in enumerate(parts):
            state = loaders[part.teller % part.world].state_dict() if part else None
            if part is None or new.anew:
                part = new
                options: dict[str, Any] = {"world": part.world, "threads": part.threads}
                options["drop_last"] = part.drop_last and part.batch * part.world <= count
                loaders = [run.loader(index, part.batch, 0, rank=r, **options) for r in range(part.world)]
            width = part.batch * part.world
            steps = None if place == len(parts) - 1 else new.steps
            stop = count - width + 1 if options["drop_last"] else count
            starts = range(position, stop, width)[:steps]
            assert {len(loader) for loader in loaders} == {len(range(0, stop, width))}
            shares = []
            for loader in loaders:
                if state:
                    loader.load_state_dict(state)
                loader.set_epoch(run.epoch + number)
                shares.append([samples(batch) for batch in islice(loader, steps)])
                if loader.regions is not None:
                    loader.regions.load_state_dict(run.table(number + 1).state_dict())
            assert [len(share) for share in shares] == [len(starts)] * part.world
            for start, *ranks in zip(starts, *shares, strict=True):
                # No rank has nothing to do: the first samples come again.
                end = start + max(min(width, count - start), part.world)
                law = [wanted[number][at % count] for at in range(start, end)]
                assert [sample for rank in ranks for sample in rank] == law
                assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
            position += len(starts) * width


def as_folder(folder: SampleIndex, into: Path) -> SampleIndex:
    return folder


def as_list(folder: SampleIndex, into: Path) -> SampleIndex:
    lines = [f"{name}\t{folder.classes[label]}\n" for name, _, label in files(folder)]
    (into / "list.txt").write_text("".join(lines))
    return SampleIndex.from_list(into / "list.txt", folder.root, **QUIET)


def as_shards(folder: SampleIndex, into: Path) -> SampleIndex:
    pattern = pack_folder(Path(folder.root), into / "shards", 3)
    return SampleIndex.from_shards(pattern, **QUIET).cached(into / "kept", 1)


def as_packed(folder: SampleIndex, into: Path) -> SampleIndex:
    pack_shards(folder, into / "packed", per_shard=5, progress=False)
    return SampleIndex.from_shards(into / "packed" / "*.tar", **QUIET)


def table_of(folder: SampleIndex) -> pa.Table:
    names, images, labels = zip(*files(folder), strict=True)
    return pa.table({"image": structs(images, names), "label": [folder.classes[label] for label in labels]})


def as_parquet(folder: SampleIndex, into: Path) -> SampleIndex:
    for number, start in enumerate(range(0, IMAGES, 8)):
        write(into / f"{number}.parquet", table_of(folder).slice(start, 8), "parquet", 3)
    return SampleIndex.from_table(into / "*.parquet", **QUIET)


def as_arrow(folder: SampleIndex, into: Path) -> SampleIndex:
    file = write(into / "a.arrow", table_of(folder), "stream", 5)
    SampleIndex.from_table(file, **QUIET).save(into / "index")
    return SampleIndex.load(into / "index")


def as_lmdb(folder: SampleIndex, into: Path) -> SampleIndex:
    with lmdb.open(str(into / "a.lmdb"), map_size=1 << 30) as to, to.begin(write=True) as put:
        for name, image, _ in files(folder):
            put.put(name.encode(), image)
    return SampleIndex.from_lmdb(into / "a.lmdb", **QUIET)


def as_source(folder: SampleIndex, into: Path) -> SampleIndex:
    names = [name for name, _, _ in files(folder)]
    return SampleIndex.from_source(Held(folder), folder.labels, folder.classes, names=names, progress=False)


def as_arrays(folder: SampleIndex, into: Path) -> SampleIndex:
    pixels = np.stack([np.array(Image.open(folder.path(row))) for row in range(len(folder))])
    return SampleIndex.from_arrays(pixels, folder.labels, folder.classes)


PLACES = [
    as_folder, as_list, as_shards, as_packed, as_parquet, as_arrow, as_lmdb, as_source, as_arrays,
]  # fmt: skip


def files(folder: SampleIndex) -> list[tuple[str, bytes, int]]:
    """Name below the root, bytes and label of every image."""
    return [
        (str(Path(folder.path(row)).relative_to(folder.root)), folder.encoded(row), int(label))
        for row, label in enumerate(folder.labels)
    ]


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A folder of small images in two classes, and the same images in a place."""
    root, arrays = tmp_path_factory.mktemp("images"), request.param is as_arrays
    for seed, name in enumerate(("ant", "bee")):
        noise_images(root / name, IMAGES // 2, (20, 21) if arrays else (12, 30), seed)
        # Arrays have one size, and the pixels of PNG are those that any decoder finds.
        for file in sorted((root / name).iterdir())[:: 1 if arrays else 2]:
            Image.open(file).save(file.with_suffix(".png"))
            file.unlink()
    folder = SampleIndex.from_folder(root, **QUIET)
    index = request.param(folder, tmp_path_factory.mktemp("place"))
    assert (index.sizes == folder.sizes).all()
    assert (index.labels.tolist(), index.classes) == (folder.labels.tolist(), folder.classes)
    return folder, index


@given(run=RUNS, epochs=EPOCHS, prefetch=st.integers(1, 3), ahead=st.integers(0, 3))
@settings(
    max_examples=-(-EXAMPLES // len(PLACES)),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_a_sample_is_that_of_the_plain_run_however_it_is_made(place, run, epochs, prefetch, ahead):
    folder = place[0].subset(run.rows)
    index = place[1].subset(range(IMAGES)[::-1]).subset([IMAGES - 1 - row for row in run.rows])
    wanted = [plain(folder, run, number) for number in range(len(epochs))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "PREFETCH", prefetch)
        patch.setattr(feed, "AHEAD", ahead)
        follow(index, run, epochs, wanted)
