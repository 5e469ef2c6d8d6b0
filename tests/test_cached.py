"""Images kept on a local disk: read once, within a bound, sound whatever happens to those who write."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import noise_images
from made_source import COUNT, Made, image_of
from tables import write

from dali_views import SampleIndex
from dali_views.data.cache import CachedSource
from dali_views.data.source import read_rows

ROOM = 1 << 30
IMPORTS = """
import sys
import numpy as np
from made_source import Made, image_of
from dali_views.data.cache import CachedSource
"""


class Counted:
    """A source that counts what it is asked for."""

    def __init__(self, images: list[bytes]) -> None:
        self.images, self.asked = images, Counter[int]()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: np.ndarray) -> list[bytes]:
        self.asked.update(rows.tolist())
        return [self.images[row] for row in rows.tolist()]


@pytest.fixture
def table() -> Counted:
    draw = np.random.default_rng(0)
    return Counted([draw.bytes(size) for size in draw.integers(1, 20_000, 50).tolist()])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Six images of one size."""
    folder = noise_images(tmp_path_factory.mktemp("photos"), 6, sizes=(40, 41))
    return [file.read_bytes() for file in sorted(folder.iterdir())]


def taken(folder: Path) -> int:
    """Bytes of the images and tables in a folder."""
    return sum(512 * file.stat().st_blocks for file in folder.rglob("images.*"))


def read(source: CachedSource, rows: object) -> list[bytes]:
    return [one.tobytes() for one in read_rows(source, np.asarray(rows, np.int64))]


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    words = [sys.executable, "-c", IMPORTS + code, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})


def test_an_image_is_read_once_by_all_who_come_and_another_key_is_another_set(table, tmp_path):
    rows = [7, 3, 7, 49, 0, 3]
    first = CachedSource(table, tmp_path, ROOM, "key")
    assert read(first, rows) == [table.images[row] for row in rows]
    assert read(first, rows[::-1]) == [table.images[row] for row in rows[::-1]]
    assert read(CachedSource(table, tmp_path, ROOM, "key"), range(50)) == table.images
    assert (table.asked, len(first)) == (Counter(range(50)), 50)
    for images, key in ((table.images[::-1], "key of others"), (table.images[:-1][::-1], "key")):
        assert read(CachedSource(Counted(images), tmp_path, ROOM, key), range(len(images))) == images


def test_what_is_kept_stays_and_what_has_no_room_is_passed_on(table, tmp_path):
    for room, least in ((200_000, 5), (5000, 0), (0, 0)):
        source = CachedSource(table, tmp_path / str(room), room, "key")
        for start in range(0, 50, 5):
            assert read(source, range(start, start + 5)) == table.images[start : start + 5]
            assert taken(tmp_path / str(room)) <= room
        table.asked.clear()
        assert read(CachedSource(table, tmp_path / str(room), room, "key"), range(50)) == table.images
        kept = 50 - len(table.asked)
        assert kept >= least
        assert set(table.asked) == set(range(kept, 50))  # who came first has stayed


def test_sets_that_nobody_uses_make_room_the_oldest_first(table, tmp_path):
    (tmp_path / "photographs.images").mkdir()
    (tmp_path / "photographs.images" / "mine.jpg").write_bytes(b"x")
    room = 3_400_000  # of three sets of a megabyte
    images = [bytes([row]) * 20_000 for row in range(50)]
    held = CachedSource(Counted(images), tmp_path, room, "held")
    read(held, range(50))
    for age, key in enumerate(["old", "new"]):
        read(CachedSource(Counted(images), tmp_path, room, key), range(50))
        os.utime(tmp_path / f"{key}-50.images", (1e9 + age, 1e9 + age))
    os.utime(tmp_path / "held-50.images", (1, 1))
    read(CachedSource(Counted(images), tmp_path, room, "next"), range(50))
    assert {one.name[:4] for one in tmp_path.glob("*-50.images")} == {"held", "new-", "next"}
    assert read(held, range(50)) == images
    assert taken(tmp_path) <= room
    assert (tmp_path / "photographs.images" / "mine.jpg").read_bytes() == b"x"


@pytest.mark.parametrize("file", ["images.data", "images.table"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_what_is_damaged_is_read_anew_and_kept_again(table, tmp_path, file, damage):
    read(CachedSource(table, tmp_path, ROOM, "key"), range(50))
    path = tmp_path / "key-50.images" / file
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + (os.urandom(len(content) - half) if damage == "noise" else b""))
    table.asked.clear()
    assert read(CachedSource(table, tmp_path, ROOM, "key"), range(50)) == table.images
    assert 15 < len(table.asked) < 50
    table.asked.clear()
    assert read(CachedSource(table, tmp_path, ROOM, "key"), range(50)) == table.images
    assert not table.asked


def test_a_set_of_a_hundred_million_rows_takes_what_it_holds(tmp_path):
    class Many(Counted):
        def __len__(self) -> int:
            return 100_000_000

        def read(self, rows: np.ndarray) -> list[bytes]:
            return [b"image %d" % row for row in rows.tolist()]

    source = CachedSource(Many([]), tmp_path, ROOM, "key")
    rows = [0, 99_999_999, 50_000_000]
    for _ in range(2):
        assert read(source, rows) == [b"image %d" % row for row in rows]
    assert taken(tmp_path) < 100_000


def test_processes_share_a_set_and_may_be_killed_at_any_moment(tmp_path):
    code = """
source = CachedSource(Made(), sys.argv[1], 1 << 30, "key")
draw = np.random.default_rng(int(sys.argv[2]))
print("begun", flush=True)
while True:
    rows = draw.integers(0, 400, 8)
    assert [bytes(one) for one in source.read(rows)] == [image_of(row) for row in rows.tolist()]
    print("read", flush=True)
"""
    for turn in range(2):
        pair = [started(code, tmp_path, 2 * turn + number) for number in range(2)]
        for process in pair:
            for _ in range(3 + 9 * turn):
                assert process.stdout is not None
                assert process.stdout.readline()
        for process in pair:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
    source, whole = CachedSource(Made(), tmp_path, ROOM, "key"), [image_of(row) for row in range(COUNT)]
    for _ in range(2):
        assert read(source, range(COUNT)) == whole
    # Nobody has lost more room than what he was writing when he was killed.
    assert taken(tmp_path) < 1.5 * sum(map(len, whole))


def test_a_copy_in_another_process_has_files_of_its_own(tmp_path):
    source = CachedSource(Made(), tmp_path / "cache", ROOM, "key")
    (tmp_path / "source.pickle").write_bytes(pickle.dumps(source))
    code = """
import os, pickle
foreign = [os.open("/dev/null", os.O_RDWR) for _ in range(40)]  # any numbers that the first process had
with open(sys.argv[1], "rb") as file:
    source = pickle.load(file)
assert [bytes(one) for one in source.read(np.arange(4))] == [image_of(row) for row in range(4)]
del source
for handle in foreign:
    os.close(handle)
print("done")
"""
    out, _ = started(code, tmp_path / "source.pickle").communicate()
    assert out == "done\n"
    assert source._kept(3) == image_of(3)  # by the other process, in the same set


def test_a_disk_that_is_full_costs_a_warning(tmp_path):
    code = """
import resource, warnings
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
source = CachedSource(Made(), sys.argv[1], 1 << 30, "key")
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(2):
        for row in range(0, 400, 20):
            rows = np.arange(row, row + 20)
            assert [bytes(one) for one in source.read(rows)] == [image_of(row) for row in rows.tolist()]
print(*(one.message for one in told), sep="\\n")
"""
    out, _ = started(code, tmp_path).communicate()
    assert out.splitlines() == [
        f"No more images are kept in {str(tmp_path)!r} (File too large); they are read from their source."
    ]


def test_folders_that_cannot_be_made_are_refused(table, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        CachedSource(table, tmp_path / "file" / "cache", ROOM, "key")
    with pytest.raises(ValueError, match="s3://bucket/kept is not a local disk"):
        SampleIndex.from_source(table, sizes=np.ones((50, 2), int), progress=False).cached(
            "s3://bucket/kept", 1, "x"
        )


def test_two_columns_of_a_table_do_not_share_what_is_kept(pictures, tmp_path):
    pair = {"left": pictures, "right": pictures[::-1]}  # of one size, as a camera with two lenses takes them
    table = pa.table({column: pa.array(images, pa.binary()) for column, images in pair.items()})
    file = write(tmp_path / "pairs.parquet", table, "parquet")
    for column, images in pair.items():
        index = SampleIndex.from_table(file, column, cache=False, progress=False)
        kept = index.cached(tmp_path / "kept", 1)
        for _ in range(2):
            assert [kept.encoded(row) for row in range(len(images))] == images


def test_what_a_source_of_one_s_own_holds_must_be_told(pictures, tmp_path):
    indexes = [SampleIndex.from_source(Counted(some), progress=False) for some in (pictures, pictures[::-1])]
    assert indexes[0].fingerprint == indexes[1].fingerprint
    with pytest.raises(ValueError, match=r"cached\(\.\.\., content=\)"):
        indexes[0].cached(tmp_path / "kept", 1)
    for index, content, images in zip(indexes, ("one", "other"), (pictures, pictures[::-1]), strict=True):
        kept = index.cached(tmp_path / "kept", 1, content)
        for _ in range(2):
            assert [kept.encoded(row) for row in range(len(images))] == images
