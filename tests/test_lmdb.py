"""LMDB: the values that were put in, the batches of the folder, and a reason for what is not used."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
import pytest
from conftest import two_classes
from PIL import Image
from test_loader import FULL, digest
from test_shards import rows_of

from dali_views import BadImageError, SampleIndex, View, ViewLoader
from dali_views.data.lmdb_scan import name_of
from dali_views.tools import cli
from trainers import config as cfg
from trainers import data

VIEWS = [View(size=8), View(size=8)]


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twenty images each."""
    return two_classes(tmp_path_factory.mktemp("classes"), 20, sizes=(40, 240))


@pytest.fixture(scope="module")
def values(classes: Path) -> dict[bytes, bytes]:
    """The images by their relative paths."""
    files = sorted(classes.rglob("*.jpg"))
    return {os.fsencode(file.relative_to(classes)): file.read_bytes() for file in files}


def write(path: Path, values: Mapping[bytes, bytes], parts: int = 1, subdir: bool = True) -> Path:
    """An environment, written in so many transactions."""
    items = list(values.items())
    with lmdb.open(str(path), map_size=1 << 28, subdir=subdir) as environment:
        for part in range(parts):
            put(environment, items[part::parts])
    return path


def put(environment: lmdb.Environment, items: Iterable[tuple[bytes, bytes]]) -> None:
    with environment.begin(write=True) as transaction:
        for key, value in items:
            transaction.put(key, value)


def from_lmdb(path: Path) -> SampleIndex:
    return SampleIndex.from_lmdb(path, cache=False, progress=False)


def held(index: SampleIndex) -> dict[bytes, bytes]:
    """What the index reads, by name."""
    names = [os.fsencode(os.path.relpath(index.path(row), index.root)) for row in range(len(index))]
    assert len(set(names)) == len(names)
    return {name: index.encoded(row) for row, name in enumerate(names)}


def tiny(number: int) -> bytes:
    """A PNG of some hundred bytes, which lies beside its key."""
    out = io.BytesIO()
    Image.fromarray(np.full((3, 4), number % 256, np.uint8)).save(out, "PNG")
    return out.getvalue()


# -- the values that were put in ------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 30])
def test_large_and_small_values_are_read_from_any_tree_and_thread(values, tmp_path, parts):
    small = {b"ant/%0400d.png" % number: tiny(number) for number in range(500)}
    items = {**values, **small}
    keys = random.Random(0).sample(sorted(items), len(items))
    path = write(tmp_path / "a", {key: items[key] for key in keys}, parts)
    with lmdb.open(str(path), map_size=1 << 28) as environment:
        assert environment.stat()["depth"] >= 3  # branches below branches
        with environment.begin(write=True) as transaction:
            for key in keys[::3]:
                transaction.delete(key)
        put(environment, [(key, items[key]) for key in keys[::6]])  # into pages that have become free
    kept = {key: items[key] for key in set(keys) - set(keys[::3]) | set(keys[::6])}
    index = from_lmdb(path)
    assert held(index) == kept
    assert list(held(index)) == sorted(kept)
    assert index.left_out == []
    rows = np.random.default_rng(0).integers(0, len(index), 1000)
    assert index.source is not None
    with ThreadPoolExecutor(8) as threads:
        read = [image for part in threads.map(index.source.read, np.array_split(rows, 50)) for image in part]
    assert read == [kept[sorted(kept)[row]] for row in rows.tolist()]


def test_an_environment_gives_the_batches_of_its_folder_also_when_resumed_and_stored(
    classes, values, tmp_path, device
):
    folder = SampleIndex.from_folder(classes, cache=False, progress=False)
    from_lmdb(write(tmp_path / "a.lmdb", values)).save(tmp_path / "index.safetensors")
    stored = SampleIndex.load(tmp_path / "index.safetensors")
    # The same names in the same order: the same data set.
    assert (stored.fingerprint, stored.classes) == (folder.fingerprint, folder.classes)
    expected = [digest(batch) for batch in ViewLoader(folder, [FULL, FULL], 8, device=device, seed=3)]
    loader = ViewLoader(stored, [FULL, FULL], 8, device=device, seed=3)
    for step, batch in enumerate(loader):
        assert digest(batch) == expected[step]
        if step == 1:
            break
    resumed = ViewLoader(stored, [FULL, FULL], 8, device=device, seed=3)
    resumed.load_state_dict(loader.state_dict())
    assert [digest(batch) for batch in resumed] == expected[2:]


def test_an_environment_is_a_folder_or_a_file(values, tmp_path):
    for subdir in (True, False):
        path = write(tmp_path / f"{subdir}.mdb", values, subdir=subdir)
        assert held(from_lmdb(path)) == values
        os.remove(f"{path}-lock" if not subdir else path / "lock.mdb")
        before = sorted(tmp_path.rglob("*"))
        assert len(from_lmdb(path)) == 40
        assert sorted(tmp_path.rglob("*")) == before  # nothing is written beside it


# -- keys and labels ------------------------------------------------------------------------------


def test_keys_that_can_be_no_names_have_others_that_tell_them(values, tmp_path):
    images = list(values.values())
    keys = [
        *(
            struct.pack(">I", 7),
            struct.pack("<Q", 7),
            b"/etc/x",
            b"a/../b",
            b"a\tb",
            b"a\nb",
            b"\xff",
            b"c\0",
        ),
        *(b"hex:00", b"plain", b"a b.jpg", "é".encode(), b"00000007"),
    ]
    index = from_lmdb(write(tmp_path / "a", dict(zip(keys, images, strict=False))))
    found = held(index)
    for key, image in zip(keys, images, strict=False):
        name = b"hex:" + key.hex().encode() if key in keys[:9] else key
        assert (name_of(key), found[name]) == (name, image)
    assert index.labels.tolist() == [-1] * len(keys)
    index.save(tmp_path / "index.safetensors")
    assert held(SampleIndex.load(tmp_path / "index.safetensors")) == found


def test_the_first_folder_is_the_class_if_all_have_one(values, tmp_path):
    images = iter(values.values())
    folders = {key: next(images) for key in (b"10/a/1.jpg", b"9/1.jpg", b"10/2.jpg", b"__len__", b"__keys__")}
    index = from_lmdb(write(tmp_path / "a", {**folders, b"__len__": b"3"}))
    assert (index.classes, index.labels.tolist()) == (["10", "9"], [0, 0, 1])
    assert index.left_out == []
    index = from_lmdb(write(tmp_path / "b", {**folders, b"lone.jpg": next(images)}))
    assert (index.classes, index.labels.tolist()) == ([], [-1] * 4)


# -- what is refused ------------------------------------------------------------------------------


def test_values_that_are_no_encoded_images_are_left_out_with_what_they_are(values, tmp_path):
    good = values[b"ant/0000.jpg"]
    trap = b"cos\nabort\n(tR."
    datum = b"\x08\x03\x10\x20\x18\x20\x22\x80\x18" + bytes(3072)
    odd = {
        b"pickle": (pickle.dumps((good, 3)), "a pickle"),
        b"old pickle": (pickle.dumps((good, 3), protocol=2), "a pickle"),
        b"trap": (trap, "not an image"),
        b"datum": (datum, "Caffe Datum"),
        b"pixels": (bytes(range(256)) * 12, "not an image"),
        b"cut": (good[:-300], "truncated"),
        b"empty": (b"", "empty"),
    }
    wrong = {key: value for key, (value, _) in odd.items()}
    index = from_lmdb(write(tmp_path / "a", {**wrong, b"good": good}))
    assert held(index) == {b"good": good}
    told = dict(index.left_out)
    for key, (_, words) in odd.items():
        assert words in told.pop(key.decode())
    assert not told
    with pytest.raises(
        ValueError, match=r"no encoded image such as a JPEG, .* \(cut: truncated .*; datum: a Caffe"
    ):
        from_lmdb(write(tmp_path / "b", wrong))


def test_databases_in_an_environment_are_not_looked_into(values, tmp_path):
    with lmdb.open(str(tmp_path / "a"), map_size=1 << 28, max_dbs=2) as environment:
        for name, several in ((b"inner", False), (b"several", True)):
            inner = environment.open_db(name, dupsort=several)
            with environment.begin(write=True, db=inner) as transaction:
                transaction.put(b"x", b"y")
                transaction.put(b"x", b"z")
        put(environment, values.items())
    index = from_lmdb(tmp_path / "a")
    assert held(index) == values
    assert {name for name, why in index.left_out if "database" in why} == {"inner", "several"}


def test_what_is_no_environment_is_refused(values, tmp_path):
    (tmp_path / "empty").mkdir()
    for absent in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(FileNotFoundError, match="no LMDB environment"):
            from_lmdb(absent)
    with lmdb.open(str(tmp_path / "a"), map_size=1 << 20):
        pass
    with pytest.raises(ValueError, match="holds no encoded image"):
        from_lmdb(tmp_path / "a")
    for content in (b"", b"no environment", bytes(10_000)):
        (tmp_path / "data.mdb").write_bytes(content)
        with pytest.raises(ValueError, match="no LMDB environment"):
            from_lmdb(tmp_path)


# -- damage and change ----------------------------------------------------------------------------


def test_an_environment_in_a_store_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"local files alone; copy s3://bucket/a\.lmdb"):
        SampleIndex.from_lmdb("s3://bucket/a.lmdb")


def test_no_damage_leads_out_of_the_file(values, tmp_path):
    small = {b"ant/%d.png" % number: tiny(number) for number in range(100)}
    file = write(tmp_path / "a", {**values, **small}) / "data.mdb"
    whole = file.read_bytes()
    tree = [
        at
        for at in range(0, len(whole), 4096)
        if whole[at : at + 8] == struct.pack("<Q", at // 4096) and whole[at + 10] in (1, 2, 8)
    ]
    assert len(tree) > 5
    draw, found = random.Random(0), 0
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 2, 5))):
            at = draw.choice(tree) + draw.choice((draw.randrange(200), draw.randrange(4096)))
            content[at : at + 1] = draw.choice((b"\0", b"\xff", draw.randbytes(1)))
        file.write_bytes(content[: draw.randrange(1, len(whole))] if draw.random() < 0.2 else content)
        try:
            index = from_lmdb(file)
        except ValueError:
            continue
        found += len(held(index))
        assert index.places is not None
        assert (index.places[:, 1] + index.places[:, 2]).max() <= file.stat().st_size
    assert found > 50 * len(values)


def test_a_damaged_value_costs_its_image_and_a_cut_what_is_lost(values, tmp_path):
    file = write(tmp_path / "a", values) / "data.mdb"
    whole, index = file.read_bytes(), from_lmdb(file)
    assert index.places is not None
    offsets = index.places[:, 1]
    row = int(np.flatnonzero(offsets % 4096 == 16)[2])  # a value in pages of its own
    key = list(values)[row]
    content = bytearray(whole)
    content[offsets[row] - 16] ^= 1  # the number of its first page
    file.write_bytes(content)
    assert held(from_lmdb(file)) == {name: image for name, image in values.items() if name != key}
    assert from_lmdb(file).left_out == [(key.decode(), "damaged or cut off with its environment")]
    file.write_bytes(whole[: offsets.max() + 100])
    index = from_lmdb(file)
    assert held(index).items() < values.items()
    assert any("cut off" in why for _, why in index.left_out)
    file.write_bytes(whole[: 2 * 4096])
    with pytest.raises(ValueError, match=r"damaged or cut off; of its 40 entries 0 were found"):
        from_lmdb(file)


def test_of_two_states_the_last_is_read_and_the_other_if_its_page_is_damaged(values, tmp_path):
    first, second = dict(list(values.items())[:20]), dict(list(values.items())[20:])
    path = write(tmp_path / "a", first)
    with lmdb.open(str(path), map_size=1 << 28) as environment:
        put(environment, second.items())
    assert held(from_lmdb(path)) == values
    content = bytearray((path / "data.mdb").read_bytes())
    newest = max((0, 4096), key=lambda at: struct.unpack_from("<Q", content, at + 16 + 128)[0])
    content[newest + 16] ^= 1
    (path / "data.mdb").write_bytes(content)
    assert held(from_lmdb(path)) == first


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda path: shutil.move(path / "data.mdb", path / "elsewhere"), "no such file"),
        (lambda path: write(path, {b"new.jpg": b"x"}), "has changed since it was indexed"),
    ],
)
def test_an_environment_that_is_gone_or_another_costs_its_images(values, tmp_path, change, word):
    index = from_lmdb(write(tmp_path / "a", values))
    change(tmp_path / "a")
    with pytest.raises(BadImageError, match="Every image"):
        rows_of(ViewLoader(index, VIEWS, 8, device="cpu", max_bad_share=1.0))
    assert len(index.quarantine) == 40
    assert all(word in why for why in index.quarantine.values())


def test_the_scan_is_kept_until_the_environment_changes(values, tmp_path):
    def scan() -> SampleIndex:
        return SampleIndex.from_lmdb(path, cache=tmp_path / "cache", progress=False)

    path = write(tmp_path / "a", values)
    first = scan()
    (kept,) = (tmp_path / "cache").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert scan().fingerprint == first.fingerprint
    assert kept.stat().st_mtime_ns == stamp
    write(path, {b"bee/new.jpg": values[b"ant/0000.jpg"]})
    assert len(scan()) == 41


# -- through the front doors ----------------------------------------------------------------------


def test_the_command_line_and_a_run_take_an_environment(values, tmp_path, capsys):
    for subdir in (True, False):
        path = str(write(tmp_path / f"{subdir}.lmdb", values, subdir=subdir))
        assert cli.main(["index", path]) == 0
        assert "40 images in 2 classes" in capsys.readouterr().out
        assert cli.main(["check", path, "--out", str(tmp_path / "bad.txt"), "--device", "cpu"]) == 0
        sets = data.open_data(cfg.Data(kind="lmdb", path=path, val_share=0.2))
        assert (len(sets.train), sets.train.classes) == (32, ["ant", "bee"])
        assert sets.queries is not None
