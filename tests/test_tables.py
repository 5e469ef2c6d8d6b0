"""Tables: the bytes that were put in, the batches of the folder, and a reason for what is not used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import two_classes
from tables import named, structs, write
from test_fuzz import run
from test_shards import rows_of

from dali_views import SampleIndex, View, ViewLoader
from dali_views.data import tables
from dali_views.data.cache import MemoryCache
from dali_views.tools import cli
from trainers import config as cfg
from trainers import data

WAYS = ("parquet none", "parquet snappy", "parquet zstd", "file", "stream")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twenty images each."""
    return two_classes(tmp_path_factory.mktemp("classes"), 20)


@pytest.fixture(scope="module")
def images(classes: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(classes.rglob("*.jpg"))]


@pytest.fixture(scope="module")
def table(images: list[bytes]) -> pa.Table:
    """The folder as a table."""
    return named(pa.table({"image": structs(images), "label": [0] * 20 + [1] * 20}), "label", ["ant", "bee"])


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch) -> MemoryCache:
    """Groups in memory, at most a megabyte."""
    kept = MemoryCache(1 << 20)
    monkeypatch.setattr(tables, "_CACHE", kept)
    return kept


def from_table(
    pattern: Any, image: str | None = None, label: str | None = None, **options: Any
) -> SampleIndex:
    return SampleIndex.from_table(pattern, image, label, **{"cache": False, "progress": False, **options})


def names(index: SampleIndex) -> list[str]:
    return [os.path.relpath(index.path(row), index.root) for row in range(len(index))]


def held(index: SampleIndex) -> list[bytes]:
    return [index.encoded(row) for row in range(len(index))]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", ["struct", "binary", "large"])
def test_any_rows_from_many_threads_are_the_bytes_that_were_written(images, tmp_path, how, kind):
    images = images + images[:3]  # equal ones, which a dictionary holds once
    plain = pa.array(images, pa.large_binary() if kind == "large" else pa.binary())
    column = structs(images) if kind == "struct" else plain
    rows = np.random.default_rng(0).integers(0, len(images), 300)
    for group in (1, 7, 100):
        index = from_table(write(tmp_path / "a.arrow", pa.table({"x": column}), how, group))
        assert held(index) == images
        assert index.holder == ("groups" if how.startswith("parquet") else "ranges")
        source = index.source
        assert source is not None
        with ThreadPoolExecutor(8) as threads:
            read = [one for part in threads.map(source.read, np.array_split(rows, 20)) for one in part]
        assert read == [images[row] for row in rows]


@pytest.mark.parametrize(
    "kinds", [("parquet none", "parquet snappy", "parquet zstd") * 2, ("file", "stream") * 3]
)
def test_tables_are_one_set_and_look_the_same_to_worker_processes(table, images, tmp_path, kinds):
    for number, how in enumerate(kinds):
        write(tmp_path / f"{number}.parquet", table.slice(8 * number, 8), how)
    index, other = (from_table(tmp_path, processes=processes) for processes in (0, 2))
    assert (held(index), index.left_out) == (images, [])
    assert (other.fingerprint, other.labels.tolist()) == (index.fingerprint, index.labels.tolist())
    assert np.array_equal(other.places, index.places)
    part = index.subset([31, 2, 17]).subset([2, 0])
    assert held(part) == [images[17], images[31]]


def test_tables_are_named_one_by_one_by_a_list_or_by_their_folder(table, images, tmp_path):
    for number in range(4):
        write(tmp_path / f"part-{number}.parquet", table.slice(10 * number, 10), "parquet")
    (tmp_path / "list.txt").write_text("# tables\npart-2.parquet\npart-{1..0}.parquet\n")
    assert held(from_table(tmp_path / "list.txt")) == images[20:30] + images[10:20] + images[:10]
    assert held(from_table(tmp_path)) == images
    with pytest.raises(FileNotFoundError, match="no table"):
        from_table(tmp_path / "part-9.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no table"):
        from_table(tmp_path / "empty")
    for number in range(2):  # as `save_to_disk` names them, beside what was computed from them
        write(tmp_path / f"data-0000{number}-of-00002.arrow", table.slice(20 * number, 20), "stream")
    write(tmp_path / "cache-1b2c3d.arrow", table, "stream")
    assert held(from_table(tmp_path)) == images


@pytest.mark.parametrize("how", ["parquet", "file", "stream"])
def test_labels_are_found_by_name_or_named(images, tmp_path, how):
    numbers, words = [2, None, 0, -1], ["b", None, "a", "c"]
    for column, label, labels, kinds, expected in [
        ("label", None, numbers, ["0", "1", "2"], [2, -1, 0, -1]),
        ("fine_label", None, words, ["a", "b", "c"], [1, -1, 0, 2]),
        ("species", "species", words, ["a", "b", "c"], [1, -1, 0, 2]),
        ("species", None, numbers, [], [-1] * 4),
        ("label", None, pa.array(words).dictionary_encode(), ["a", "b", "c"], [1, -1, 0, 2]),
        ("label", None, pa.array(numbers, pa.int8()), ["0", "1", "2"], [2, -1, 0, -1]),
    ]:
        table = pa.table({"image": images[:4], column: labels})
        index = from_table(write(tmp_path / "a.parquet", table, how), label=label)
        assert (index.labels.tolist(), index.classes) == (expected, kinds)
    floats = pa.table({"image": pa.array(images, pa.binary()), "label": pa.array([1.0, None] * 20)})
    with pytest.warns(UserWarning, match="the column 'label' holds double"):
        index = from_table(write(tmp_path / "a.parquet", floats, how))
    assert (index.labels == -1).all()


def test_names_of_numbers_become_classes(images, tmp_path):
    table = pa.table({"image": images[:3], "label": [1, 0, -1]})
    index = from_table(write(tmp_path / "a.parquet", named(table, "label", ["x", "y", "z"])))
    assert (index.classes, index.labels.tolist()) == (["x", "y", "z"], [1, 0, -1])
    with pytest.raises(ValueError, match=r"labels up to 1, but names of 1 classes"):
        from_table(write(tmp_path / "a.parquet", named(table, "label", ["x"])))
    for odd in (7, "xy", [1, 2], {"x": 1}):
        assert from_table(write(tmp_path / "a.parquet", named(table, "label", odd))).classes == ["0", "1"]


@pytest.mark.parametrize("how", ["parquet", "file", "stream"])
def test_the_column_of_images_is_the_only_one_that_fits_or_named(images, tmp_path, how):
    table = pa.table({"image": structs(images[:3]), "mask": images[3:6], "text": ["a", "b", "c"]})
    file = write(tmp_path / "a.parquet", table, how)
    with pytest.raises(ValueError, match=r"'image\.bytes', 'mask' can all hold encoded images.*name one"):
        from_table(file)
    assert from_table(file, "mask").encoded(1) == images[4]
    assert from_table(file, "image").encoded(1) == from_table(file, "image.bytes").encoded(1) == images[1]
    for wrong in ("text", "none", "image.path"):
        with pytest.raises(ValueError, match=f"No column can hold encoded images of the name '{wrong}'"):
            from_table(file, wrong)
    with pytest.raises(ValueError, match="no column 'none' of whole numbers or words"):
        from_table(file, "mask", "none")
    with pytest.raises(ValueError, match=r"No column can hold .*the columns are 'text'"):
        from_table(write(file, table.select(["text"]), how))


def test_tables_that_are_not_like_the_first_are_left_out(table, images, tmp_path):
    write(tmp_path / "0.parquet", table, "parquet")
    write(tmp_path / "1.parquet", table.rename_columns(["picture", "label"]), "parquet")
    write(tmp_path / "2.parquet", table.select(["image"]), "file")
    write(tmp_path / "3.parquet", named(table, "label", ["bee", "ant"]), "file")
    (tmp_path / "4.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "5.parquet").write_bytes(b"")
    os.mkfifo(tmp_path / "6.parquet")
    write(tmp_path / "7.parquet", table, "stream zstd")
    index = from_table(tmp_path / "{0..8}.parquet")
    assert held(index) == images
    reasons = [
        "images of the name 'image.bytes'",
        "no column 'label'",
        "are not those of the first",
        "damaged",
        "neither a Parquet nor an Arrow file",
        "not a regular file",
        "are not those of the first",
        "no such file",
    ]
    for number, (words, (name, told)) in enumerate(zip(reasons, index.left_out, strict=True), 1):
        assert name == f"{number}.parquet"
        assert words in told
    for how in ("file lz4", "stream zstd"):
        with pytest.raises(ValueError, match=r"it is compressed, .* write it as Parquet"):
            from_table(write(tmp_path / "8.parquet", table, how))


@pytest.mark.parametrize("how", ["parquet", "file", "stream"])
@pytest.mark.parametrize("odd", ["1.jpg", "../2.jpg", "/2.jpg", "a\nb.jpg", "", None])
def test_rows_are_named_by_their_paths_if_all_can_be(images, tmp_path, how, odd):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.parquet", pa.table({"x": structs(images[:3], ["n/1.jpg", "é.jpg", "1.jpg"])}), how)
    write(tmp_path / "sub" / "b.parquet", pa.table({"x": structs(images[:3], ["0.jpg", "1.jpg", odd])}), how)
    assert names(from_table([tmp_path / "a.parquet", tmp_path / "sub" / "b.parquet"])) == [
        *("a.parquet/n/1.jpg", "a.parquet/é.jpg", "a.parquet/1.jpg"),
        *("sub/b.parquet/row 0", "sub/b.parquet/row 1", "sub/b.parquet/row 2"),
    ]


@pytest.mark.parametrize("how", WAYS)
def test_rows_without_a_usable_image_are_left_out_and_the_others_keep_their_labels(images, tmp_path, how):
    rows = [images[0], None, b"text", images[1], b"", images[2][:200], images[3]]
    column = pa.concat_arrays([structs(rows), pa.array([None, {"bytes": images[4]}], structs([]).type)])
    for pictures in (column, pc.struct_field(column, "bytes")):
        table = pa.table({"image": pictures, "label": pa.array([0, 1, 2, 3, None, 5, 6, 7, 8])})
        index = from_table(write(tmp_path / "a.parquet", table, how, group=4))
        assert held(index) == [images[n] for n in (0, 1, 3, 4)]
        assert index.labels.tolist() == [0, 3, 6, 8]
        # A struct that is null has no path, so that rows have numbers.
        assert names(index) == [f"a.parquet/row {row}" for row in (0, 3, 6, 8)]
        told = [why for _, why in index.left_out]
        reasons = ("no bytes", "not an image", "empty", "truncated", "no bytes")
        assert all(word in why for word, why in zip(reasons, told, strict=True))
    with pytest.raises(ValueError, match=r"no usable image \(a.parquet/0.jpg: not an image"):
        from_table(write(tmp_path / "a.parquet", pa.table({"image": structs([b"text"])}), how))


@pytest.mark.parametrize("how", ["file", "stream"])
def test_of_a_cut_arrow_table_what_stands_before_is_used(table, images, tmp_path, how):
    whole = write(tmp_path / "a.arrow", table, how).read_bytes()
    for kept in (7, 21):
        (tmp_path / "a.arrow").write_bytes(whole[: whole.index(images[kept + 3])])
        index = from_table(tmp_path / "a.arrow")
        assert held(index) == images[:kept]
        ((name, why),) = index.left_out
        assert (name, f"the {kept} rows before are used" in why) == ("a.arrow", True)


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_a_damaged_row_group_costs_its_rows(table, images, tmp_path, compression):
    file = write(tmp_path / "a.parquet", table, f"parquet {compression}")
    start = pq.read_metadata(file).row_group(2).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[start : start + 20] = b"\xff" * 20  # the header of its first page
    file.write_bytes(content)
    index = from_table(file)
    assert held(index) == images[:14] + images[21:]
    assert names(index)[13:15] == ["a.parquet/13.jpg", "a.parquet/21.jpg"]
    ((name, why),) = index.left_out
    assert (name, "its 7 rows are lost" in why) == ("a.parquet/group 2", True)
    os.truncate(file, len(content) - 100)
    write(tmp_path / "b.parquet", table, "parquet")
    index = from_table(tmp_path)
    assert (len(index), [name for name, _ in index.left_out]) == (40, ["a.parquet"])


@pytest.mark.slow
def test_no_damage_crashes_hangs_or_takes_the_memory(tmp_path):
    outcomes, findings = run(500, seed=3, kinds=("table", "lmdb"), folder=tmp_path)
    assert findings == []
    assert {how for of, how in outcomes if of == "table"} == {"loaded", "left out", "refused"}
    assert {how for of, how in outcomes if of == "lmdb"} >= {"loaded", "refused"}


@pytest.mark.parametrize("how", ["parquet", "file"])
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda file: file.unlink(), "no such file"),
        (lambda file: os.utime(file, ns=(1, 1)), "has changed since it was indexed"),
        (lambda file: os.truncate(file, 1000), "has changed since it was indexed"),
    ],
)
def test_a_table_that_is_gone_or_another_costs_its_images(table, tmp_path, how, change, word):
    for part in range(2):
        write(tmp_path / f"{part}.parquet", table.slice(20 * part, 20), how)
    index = from_table(tmp_path)
    change(tmp_path / "1.parquet")
    loader = ViewLoader(index, [View(size=8)], 8, device="cpu", max_bad_share=0.6)
    assert set(rows_of(loader)) == set(range(20))
    assert len(index.quarantine) == 20
    assert all("1.parquet" in path and word in why for path, why in index.quarantine.items())


def test_the_scan_is_kept_until_a_table_changes(table, tmp_path):
    file = write(tmp_path / "a.parquet", table, "parquet")
    first = from_table(file, cache=tmp_path / "cache")
    again = from_table(file, cache=tmp_path / "cache")
    assert (again.fingerprint, again.holder, again.column) == (first.fingerprint, "groups", "image.bytes")
    assert again.encoded(3) == first.encoded(3)
    write(file, table.slice(5), "parquet")
    assert len(from_table(file, cache=tmp_path / "cache")) == 35


def test_a_place_that_its_table_does_not_have_is_an_unreadable_image(table, images, tmp_path):
    index = from_table(write(tmp_path / "a.parquet", table, "parquet"))
    assert index.places is not None
    for column, value in ((1, 6), (1, (1 << 63) - 1), (2, 7), (2, (1 << 63) - 1)):
        places = index.places.copy()
        places[3, column] = value
        wrong = replace(index, places=places, source=None)
        with pytest.raises(OSError, match="has no"):
            wrong.encoded(3)
        assert wrong.encoded(4) == images[4]
    with pytest.raises(OSError, match=r"has no|damaged"):
        replace(index, column="other", source=None).encoded(3)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """How often each row group of each file has been decoded since."""
    counts: Counter[tuple[int, int]] = Counter()
    opened = tables._parquet

    def counted(file: Any, size: int, footer: Any) -> Any:
        table = opened(file, size, footer)
        return table._replace(read=lambda *job: (counts.update([(id(footer), job[0])]), table.read(*job))[1])

    monkeypatch.setattr(tables, "_parquet", counted)
    return counts


@pytest.mark.parametrize("group", [1, 7, 100])
def test_reading_in_order_decodes_every_group_once_however_little_is_kept(
    table, images, tmp_path, cache, decoded, group
):
    cache.most_bytes = 0
    for part in range(2):
        write(tmp_path / f"{part}.parquet", table, "parquet", group)
    source = from_table(tmp_path).source
    assert source is not None
    decoded.clear()
    read = [image for start in range(0, 80, 16) for image in source.read(np.arange(start, start + 16))]
    assert read == images + images
    assert set(decoded.values()) == {1}
    assert len(decoded) == 2 * -(-40 // group)


def test_decoded_groups_stay_below_a_bound_in_any_order(table, images, tmp_path, cache, decoded):
    cache.most_bytes = 2 * max(sum(map(len, images[start : start + 7])) for start in range(0, 40, 7)) + 1000
    source = from_table(write(tmp_path / "a.parquet", table, "parquet")).source
    assert source is not None
    for row in np.random.default_rng(0).integers(0, 40, 200).tolist():
        assert source.read(np.array([row])) == [images[row]]
        assert 0 < cache.used_bytes() <= cache.most_bytes
    assert sum(decoded.values()) > 50
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(source.read, np.random.default_rng(1).integers(0, 40, (100, 4))))
    assert 0 < cache.used_bytes() <= cache.most_bytes


def test_threads_that_need_one_group_wait_for_one_of_them_and_an_error_is_not_kept(cache):
    group, runs, together = pa.array([b"xyz"]), [], threading.Barrier(4)

    def decode() -> Any:
        runs.append(1)
        return group

    def unplugged() -> Any:
        raise OSError("unplugged")

    def get(_: int) -> Any:
        together.wait()
        return cache.get("a", decode)

    for _ in range(2):
        with pytest.raises(OSError, match="unplugged"):
            cache.get("a", unplugged)
    with ThreadPoolExecutor(4) as threads:
        assert all(one is group for one in threads.map(get, range(4)))
    assert len(runs) == 1


def test_a_forked_process_reads_groups_of_its_own(table, images, tmp_path, cache):
    index = from_table(write(tmp_path / "a.parquet", table, "parquet"))
    code = (
        "import os, sys; from dali_views import SampleIndex; from dali_views.data import tables\n"
        "index = SampleIndex.from_table(sys.argv[1], cache=False, progress=False); index.encoded(0)\n"
        "tables._CACHE._lock.acquire()\n"  # as a thread of the parent may hold it
        "child = os.fork()\n"
        "if not child: print(len(index.encoded(39)), flush=True); os._exit(0)\n"
        "os.waitpid(child, 0)"
    )
    words = [sys.executable, "-c", code, index.files[0]]
    told = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=tmp_path).stdout
    assert told == f"{len(images[39])}\n"


def test_what_random_order_costs_is_told_where_it_costs(table, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "KEPT_BYTES", 1000)
    megabytes = write(tmp_path / "a.parquet", table, "parquet", 20).stat().st_size / 2 / 1e6
    for kept in (True, True, False):
        with pytest.warns(UserWarning, match=f"random order, {megabytes:.1f} MB.*dali-views pack"):
            from_table(tmp_path / "a.parquet", cache=kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_table(write(tmp_path / "a.parquet", table, "parquet", 16))
        from_table(write(tmp_path / "a.arrow", table, "file", 40))
        monkeypatch.setattr(tables, "KEPT_BYTES", 1 << 20)
        from_table(write(tmp_path / "a.parquet", table, "parquet", 40))


def test_the_command_line_takes_tables(classes, table, tmp_path, capsys):
    folder = tmp_path / "tables"
    folder.mkdir()
    parts = [write(folder / f"{n}.parquet", table.slice(20 * n, 20), "parquet") for n in range(2)]
    shutil.copytree(classes, tmp_path / "photos")
    write(tmp_path / "photos" / "metadata.parquet", table.slice(0, 3), "parquet")  # is no set of tables then
    two = table.append_column("mask", [table["image"].combine_chunks().field("bytes")])
    arrow = str(write(tmp_path / "two.arrow", two))
    (tmp_path / "a.tar").touch()
    for words, told in (
        ([folder], "40 images in 2 classes"),
        (parts, "40 images in 2 classes"),
        ([arrow, "--image", "mask", "--label", "label"], "40 images in 2 classes"),
        ([tmp_path / "photos"], "40 images in 2 classes"),
        ([arrow], "name one of them"),
        ([arrow, tmp_path / "a.tar"], "of tar shards and of tables"),
    ):
        assert cli.main(["index", *map(str, words)]) == (0 if "classes" in told else 2)
        assert told in "".join(capsys.readouterr())


@pytest.mark.parametrize("package", ["pyarrow", "lmdb"])
def test_without_a_package_one_sentence_says_what_to_install(table, tmp_path, package):
    from_table(write(tmp_path / "a.parquet", table, "parquet")).save(tmp_path / "index")
    lines = (
        ["from_table('a.parquet')", "load('index')"] if package == "pyarrow" else ["from_lmdb('a.parquet')"]
    )
    for line in lines:
        code = f"import sys; sys.modules[{package!r}] = None; import dali_views as d; d.SampleIndex.{line}"
        words = [sys.executable, "-c", code]
        told = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path).stderr.splitlines()[-1]
        assert told.startswith(f"ValueError: These images are read with {package}, which is not installed")
        assert "the extra 'tables'" in told


def test_a_run_reads_tables(table, tmp_path):
    two = table.append_column("mask", [table["image"].combine_chunks().field("bytes")])
    write(tmp_path / "a.parquet", two.rename_columns(["image", "kind", "mask"]), "parquet")
    where = {"path": str(tmp_path), "image": "mask", "label": "kind"}
    sets = data.open_data(cfg.Data(kind="table", val_share=0.2, **where))
    assert (len(sets.train), sets.train.classes) == (32, ["0", "1"])
    assert sets.queries is not None
    with pytest.raises(ValueError, match=r"only read for data\.kind table"):
        cfg.Data(kind="shards", path=str(tmp_path), image="mask")
