"""LMDB: the values that were put in, the batches of the folder, and a reason for what is not used."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
import pytest
from conftest import two_classes
from PIL import Image

from dali_views import SampleIndex
from dali_views.tools import cli
from trainers import config as cfg
from trainers import data


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
    """An environment, written in this many transactions."""
    items = list(values.items())
    with lmdb.open(str(path), map_size=1 << 28, subdir=subdir) as environment:
        for part in range(parts):
            put(environment, dict(items[part::parts]))
    return path


def put(environment: lmdb.Environment, values: Mapping[bytes, bytes]) -> None:
    with environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)


def from_lmdb(path: Path) -> SampleIndex:
    return SampleIndex.from_lmdb(path, cache=False, progress=False)


def held(index: SampleIndex) -> dict[bytes, bytes]:
    """What the index reads, by name."""
    names = [os.fsencode(os.path.relpath(index.path(row), index.root)) for row in range(len(index))]
    assert len(set(names)) == len(names)
    return {name: index.encoded(row) for row, name in enumerate(names)}


def tiny(number: int) -> bytes:
    """A PNG of some hundred bytes, which LMDB stores beside its key."""
    out = io.BytesIO()
    Image.fromarray(np.full((3, 4), number % 256, np.uint8)).save(out, "PNG")
    return out.getvalue()


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
        put(environment, {key: items[key] for key in keys[::6]})  # into pages that have become free
    kept = {key: items[key] for key in set(keys) - set(keys[::3]) | set(keys[::6])}
    index = from_lmdb(path)
    assert list(held(index).items()) == sorted(kept.items())
    assert index.left_out == []
    rows = np.random.default_rng(0).integers(0, len(index), 1000)
    assert index.source is not None
    with ThreadPoolExecutor(8) as threads:
        read = [image for part in threads.map(index.source.read, np.array_split(rows, 50)) for image in part]
    assert read == [kept[sorted(kept)[row]] for row in rows.tolist()]


def test_an_environment_is_a_folder_or_a_file_and_the_same_data_set_as_its_folder(classes, values, tmp_path):
    folder = SampleIndex.from_folder(classes, cache=False, progress=False)
    for subdir in (True, False):
        path = write(tmp_path / f"{subdir}.mdb", values, subdir=subdir)
        index = from_lmdb(path)
        assert held(index) == values
        assert (index.fingerprint, index.classes) == (folder.fingerprint, folder.classes)
        os.remove(f"{path}-lock" if not subdir else path / "lock.mdb")
        before = sorted(tmp_path.rglob("*"))
        assert len(from_lmdb(path)) == 40
        assert sorted(tmp_path.rglob("*")) == before  # nothing is written beside it


def test_keys_that_can_be_no_names_are_named_by_their_digits(values, tmp_path):
    odd = [struct.pack("<Q", 7), b"/etc/x", b"a/../b", b"a\tb", b"a\nb", b"\xff", b"c\0", b"hex:00"]
    keys = [*odd, b"plain", b"a b.jpg", "é".encode(), b"00000007"]
    items = dict(zip(keys, values.values(), strict=False))
    index = from_lmdb(write(tmp_path / "a", items))
    expected = {b"hex:" + key.hex().encode() if key in odd else key: image for key, image in items.items()}
    assert held(index) == expected
    index.save(tmp_path / "index.safetensors")
    assert held(SampleIndex.load(tmp_path / "index.safetensors")) == expected


def test_the_first_folder_is_the_class_if_all_have_one(values, tmp_path):
    images = iter(values.values())
    folders = {key: next(images) for key in (b"10/a/1.jpg", b"9/1.jpg", b"10/2.jpg", b"__len__", b"__keys__")}
    index = from_lmdb(write(tmp_path / "a", {**folders, b"__len__": b"3"}))
    assert (index.classes, index.labels.tolist(), index.left_out) == (["10", "9"], [0, 0, 1], [])
    index = from_lmdb(write(tmp_path / "b", {**folders, b"lone.jpg": next(images)}))
    assert (index.classes, index.labels.tolist()) == ([], [-1] * 4)


def test_values_that_are_no_encoded_images_are_left_out_with_what_they_are(values, tmp_path):
    good = values[b"ant/0000.jpg"]
    odd = {
        "pickle": (pickle.dumps((good, 3)), "not an image"),
        "trap": (b"cos\nabort\n(tR.", "not an image"),
        "datum": (b"\x08\x03\x10\x20\x18\x20\x22\x80\x18" + bytes(3072), "not an image"),
        "cut": (good[:-300], "truncated"),
        "empty": (b"", "empty"),
    }
    wrong = {key.encode(): value for key, (value, _) in odd.items()}
    index = from_lmdb(write(tmp_path / "a", {**wrong, b"good": good}))
    assert held(index) == {b"good": good}
    for key, why in index.left_out:
        assert why.startswith(odd.pop(key)[1])
    assert not odd
    with pytest.raises(ValueError, match=r"no encoded image such as a JPEG, .* \(cut: trunc.*; datum: not"):
        from_lmdb(write(tmp_path / "b", wrong))


def test_what_is_no_environment_or_cut_off_is_refused_in_a_sentence(values, tmp_path):
    (tmp_path / "empty").mkdir()
    for absent in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(FileNotFoundError, match="no LMDB environment"):
            from_lmdb(absent)
    with pytest.raises(ValueError, match=r"local files alone; copy s3://bucket/a\.lmdb"):
        SampleIndex.from_lmdb("s3://bucket/a.lmdb")
    with lmdb.open(str(tmp_path / "a"), map_size=1 << 20):
        pass
    with pytest.raises(ValueError, match="holds no encoded image"):
        from_lmdb(tmp_path / "a")
    whole = (write(tmp_path / "whole", values) / "data.mdb").read_bytes()
    for content, told in (
        *((content, "no LMDB environment") for content in (b"", b"no environment", bytes(10_000))),
        *((whole[:size], "truncated") for size in (2 * 4096, len(whole) // 2, len(whole) - 5000)),
    ):
        (tmp_path / "data.mdb").write_bytes(content)
        with pytest.raises(ValueError, match=told):
            from_lmdb(tmp_path)


def test_damage_ends_in_a_sentence_even_where_the_library_aborts(tmp_path):
    images = {b"ant/%03d.png" % number: tiny(number) + bytes(300) for number in range(100)}
    file = write(tmp_path / "a", images) / "data.mdb"
    whole = file.read_bytes()
    leaves = [at for at in range(0, len(whole), 4096) if whole[at + 10] == 2]
    for at, damage in ((leaves[3] + 16, b"\xff" * 60), (leaves[3] + 10, b"\0")):  # its nodes, its kind
        file.write_bytes(whole[:at] + damage + whole[at + len(damage) :])
        with pytest.raises(ValueError, match="damaged"):
            from_lmdb(file)


def test_the_command_line_and_a_run_take_an_environment(values, tmp_path, capsys):
    for subdir in (True, False):
        path = str(write(tmp_path / f"{subdir}.lmdb", values, subdir=subdir))
        assert cli.main(["index", path]) == 0
        assert "40 images in 2 classes" in capsys.readouterr().out
        sets = data.open_data(cfg.Data(kind="lmdb", path=path, val_share=0.2))
        assert (len(sets.train), sets.train.classes) == (32, ["ant", "bee"])
        assert sets.queries is not None
