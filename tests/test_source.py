"""A source of one's own: the batches of the files it holds, read ahead, and what its failures cost."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from test_loader import FULL, VIEWS, digest, rows_of

from dali_views import BadImageError, SampleIndex, Source, SourceGoneError, View, ViewLoader
from dali_views.data.source import AHEAD
from dali_views.tools.check import check

NAME = "dali_views read"
pytestmark = pytest.mark.filterwarnings("ignore:Left out while running")


class Table:
    """Images in memory, of which some raise; it counts what it is asked for."""

    def __init__(self, images: list[bytes], arrays: bool = False) -> None:
        self.images = [np.frombuffer(image, np.uint8) for image in images] if arrays else images
        self.errors: dict[int, Exception] = {}
        self.asked: Counter[int] = Counter()
        self.changed = threading.Condition()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: np.ndarray) -> list[bytes | np.ndarray]:
        with self.changed:
            self.asked.update(rows.tolist())
            self.changed.notify_all()
        for row in rows.tolist():
            if row in self.errors:
                raise self.errors[row]
        return [self.images[row] for row in rows.tolist()]


@pytest.fixture
def table(small_index: SampleIndex) -> Table:
    return Table([small_index.encoded(row) for row in range(40)])


def index_of(source: Source, **options: object) -> SampleIndex:
    return SampleIndex.from_source(source, progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("arrays", [False, True])
def test_a_source_gives_the_batches_of_its_files_also_when_resumed(small_index, table, device, arrays):
    files = replace(small_index, labels=np.arange(40, dtype=np.int32))
    source = index_of(Table(table.images, arrays), labels=np.arange(40))
    assert np.array_equal(source.sizes, files.sizes)
    loaders = [ViewLoader(index, [FULL], 8, device=device) for index in (files, source)]
    expected = [digest(batch) for batch in loaders[0]]
    assert [digest(batch) for batch in loaders[1]] == expected
    loaders[1].set_epoch(0)
    assert digest(next(iter(loaders[1]))) == expected[0]
    resumed = ViewLoader(source, [FULL], 8, device=device)
    resumed.load_state_dict(loaders[1].state_dict())
    assert [digest(batch) for batch in resumed] == expected[1:]


def test_coming_batches_are_read_while_nobody_asks_for_them(table):
    loader = ViewLoader(index_of(table), VIEWS, 4, device="cpu", shuffle=False)
    table.asked.clear()
    batches = iter(loader)
    next(batches)
    reach = 4 * (2 + AHEAD)  # one in hand, one in the graph
    with table.changed:
        assert table.changed.wait_for(lambda: sum(table.asked.values()) >= reach, timeout=60)
    assert set(table.asked) == set(range(reach))
    rest = [row for batch in batches for row in batch.index.tolist()]
    assert rest == list(range(4, 40))
    assert set(table.asked.values()) == {1}


def test_neither_an_abandoned_loop_nor_a_whole_one_leaves_batches_or_threads(table):
    before = set(threading.enumerate())

    def readers() -> list[threading.Thread]:
        return [thread for thread in set(threading.enumerate()) - before if thread.name.startswith(NAME)]

    def all_end() -> bool:
        for thread in readers():
            thread.join(60)
        return not readers()

    loader = ViewLoader(index_of(table), [View(size=8)], 4, device="cpu", shuffle=False)
    for _ in range(3):
        next(iter(loader))
        assert readers()
    assert rows_of(loader) == list(range(40))
    assert all_end()
    next(iter(loader))
    del loader
    gc.collect()
    assert all_end()


def test_rows_that_raise_are_bad_images_for_the_reason_told(table):
    index = index_of(table)
    table.errors = {7: OSError("the page is torn"), 19: KeyError("no such row"), 20: FileNotFoundError()}
    loader = ViewLoader(index, VIEWS, 8, device="cpu")
    rows = rows_of(loader)
    assert (len(rows), set(rows)) == (40, set(range(40)) - set(table.errors))
    assert index.quarantine == {
        "row 7": "cannot be read (the page is torn)",
        "row 19": "cannot be read ('no such row')",
        "row 20": "no such file",
    }
    with pytest.raises(BadImageError, match=r"row (7|19|20): (cannot be read|no such file).*on_bad_image"):
        rows_of(ViewLoader(index, VIEWS, 8, device="cpu", on_bad_image="raise"))


@pytest.mark.parametrize("damage", [b"", b"\xff\xd8\xff"])
def test_bytes_that_are_no_image_cost_that_image(table, damage):
    index = index_of(table)
    table.images[11] = damage
    assert set(rows_of(ViewLoader(index, VIEWS, 8, device="cpu"))) == set(range(40)) - {11}
    assert check(index_of(table, sizes=index.sizes), device="cpu", progress=False) == index.quarantine


@pytest.mark.parametrize("error", [SourceGoneError("no bucket"), ConnectionRefusedError("no server")])
def test_a_source_that_is_gone_ends_the_run_and_blames_no_image(table, error):
    index = index_of(table)
    loader = ViewLoader(index, VIEWS, 8, device="cpu")
    table.errors = dict.fromkeys(range(40), error)
    with pytest.raises(BadImageError, match=f"source of the images is gone .{error}"):
        rows_of(loader)
    assert not index.quarantine
    with pytest.raises(type(error)):
        index_of(table)
    table.errors = {}
    assert sorted(rows_of(loader)) == list(range(40))


def test_a_failure_that_has_passed_costs_nothing(table):
    class Once(dict):
        def __contains__(self, row: object) -> bool:
            return super().__contains__(row) and table.asked[row] == 1

    index = index_of(table)
    table.asked.clear()
    table.errors = Once({5: OSError("try again"), 30: OSError("try again")})
    assert sorted(rows_of(ViewLoader(index, VIEWS, 8, device="cpu"))) == list(range(40))
    assert not index.quarantine


def test_what_cannot_be_used_is_left_out_from_the_start(table):
    table.images[3] = b"no image"
    table.errors = {8: OSError("the page is torn")}
    index = index_of(table, labels=np.arange(40), names=[f"{row}.jpg" for row in range(40)])
    assert dict(index.left_out) == {
        "3.jpg": "not an image, or truncated in its header",
        "8.jpg": "cannot be read (the page is torn)",
    }
    assert index.labels.tolist() == [row for row in range(40) if row not in (3, 8)]
    assert index.path(7) == "9.jpg"
    assert index.encoded(7) == table.images[9]
    assert index.subset([7, 1]).subset([0]).encoded(0) == table.images[9]


def test_sizes_that_are_given_save_the_reading(table):
    sizes = index_of(table).sizes
    table.asked.clear()
    index = index_of(table, sizes=sizes.tolist())
    assert not table.asked
    assert np.array_equal(index.sizes, sizes)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"sizes": np.ones((39, 2), int)}, "sizes must be"),
        ({"sizes": np.full((40, 2), 60_000)}, "pixels in all"),
        ({"names": ["a"] * 40}, "40 different texts"),
        ({"labels": np.zeros(39, int)}, "shape"),
        ({"labels": np.full(40, 3), "classes": ["a"]}, "labels must lie"),
    ],
)
def test_what_does_not_fit_the_source_is_refused(table, options, word):
    with pytest.raises(ValueError, match=word):
        index_of(table, **options)


def test_an_empty_source_one_of_other_things_and_a_saved_one_are_refused(table, tmp_path):
    with pytest.raises(ValueError, match="None of the 0 images"):
        index_of(Table([]))
    with pytest.raises(TypeError, match="cannot be saved"):
        index_of(table).save(tmp_path / "index.safetensors")
    table.images = ["text"] * 40  # type: ignore[list-item]
    with pytest.raises(ValueError, match="str, not bytes or a 1-D array"):
        index_of(table)
