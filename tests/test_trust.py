"""What is loaded is never believed: hostile files execute nothing, exhaust nothing, and end in a sentence."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import noise_images
from mutations import Trap
from PIL import Image
from tars import pack_folder

from dali_views import RegionTable, SampleIndex
from dali_views.system.files import load_arrays, pack_names, save_arrays
from trainers.config.file import ConfigError, load, parse


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return noise_images(tmp_path / "images", 3)


@pytest.fixture
def stored(images: Path, tmp_path: Path) -> Path:
    """A saved index with boxes."""
    index = SampleIndex.from_folder(images, cache=False)
    boxed = index.with_boxes({"0000.jpg": [[0, 0, 1, 1], [0, 0, 0.5, 1]], "0002.jpg": [[0, 0.2, 1, 1]]})
    boxed.save(tmp_path / "index.safetensors")
    return tmp_path / "index.safetensors"


def altered(path: Path, changes: dict[str, Any]) -> None:
    """Other arrays and facts, or none, in a file whose checksum is right."""
    with load_arrays(path, "file") as (arrays, facts):
        for name, value in changes.items():
            part = arrays if isinstance(value, np.ndarray) or name in arrays else facts
            part[name] = value
            if value is None:
                del part[name]
        save_arrays(path, arrays, facts)


# -- files of arrays ------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [pickle.dump, lambda what, file: np.savez(file, labels=what)])
def test_what_would_be_executed_is_refused(tmp_path: Path, save: Callable[..., None]) -> None:
    with (tmp_path / "index").open("wb") as file:
        save(np.array([Trap(tmp_path / "sprung")], dtype=object), file)
    for kind in (SampleIndex, RegionTable):
        with pytest.raises(ValueError, match="is not a readable"):
            kind.load(tmp_path / "index")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "header",
    [
        '{"labels": {"dtype": "I32", "shape": [100000000000000], "data_offsets": [0, 400000000000000]}}',
        '{"labels": {"dtype": "I32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
        '{"labels": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}',
        '{"labels": ' + "[" * 100_000,
        "",
    ],
)
@pytest.mark.parametrize("length", [None, 2**63 - 1])
def test_a_header_that_claims_what_is_not_there_is_refused(tmp_path, header, length):
    size = (length or len(header)).to_bytes(8, "little")
    (tmp_path / "index").write_bytes(size + header.encode())
    with pytest.raises(ValueError, match="is not a readable index"):
        SampleIndex.load(tmp_path / "index")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": np.array([0, 1, 2], np.int32)}, "labels have no class"),
        ({"labels": np.array([-1, -1], np.int32)}, r"is int32 of shape \("),
        ({"labels": np.full(3, -1.0)}, "labels is float64"),
        ({"sizes": np.array([[1, 1], [1, 0], [1, 1]], np.int32)}, "sizes are not valid"),
        ({"box_start": np.array([0, 4, 2, 3])}, "box_start does not divide"),
        ({"boxes": np.full((3, 4), np.nan, np.float32)}, "boxes are not rectangles"),
        ({"boxes": np.tile(np.float32([0.9, 0.9, 0.1, 0.1]), (3, 1))}, "boxes are not rectangles"),
        ({"paths": pack_names([b"a.jpg", b"b/../../c.jpg", b"d.jpg"])}, "leaves the root"),
        ({"paths": pack_names([b"a.jpg", b"/etc/c.jpg", b"d.jpg"])}, "leaves the root"),
        ({"paths": pack_names([b"a.jpg", b"b\0c.jpg", b"d.jpg"])}, "NUL inside"),
        ({"arrays": np.zeros((3, 2, 2, 3), np.uint8)}, "no images"),
        ({"root": "images"}, "not an absolute path"),
        ({"classes": "cats"}, "not a list"),
        ({"left_out": [["a", "b", "c"]]}, "arguments"),
        ({"format": 0}, "this version reads"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(stored, changes, words):
    altered(stored, changes)
    with pytest.raises(ValueError, match=f"is not a readable index .*{words}"):
        SampleIndex.load(stored)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"files": ["../a.tar"]}, "leaves the root"),
        ({"files": ["a\0b"]}, "NUL inside"),
        ({"files": [1]}, "expected str"),
        ({"files": ["a.tar", "b.tar"]}, "file_stamps is int64"),
        ({"file_stamps": np.array([[10, 0]])}, "lies in no file"),
        ({"file_stamps": None}, "a part of what"),
        ({"places": np.array([[0, 0, 9]] * 2)}, "does not fit the rest"),
        ({"places": np.array([[1, 0, 9]] * 3)}, "lies in no file"),
        ({"places": np.array([[0, 2**63 - 1, 9]] * 3)}, "lies in no file"),
        ({"column": "image"}, "a part of what"),
    ],
)
def test_an_index_of_shards_that_contradicts_itself_is_refused(images, tmp_path, changes, words):
    SampleIndex.from_shards(pack_folder(images, tmp_path / "shards", 1)).save(tmp_path / "index")
    altered(tmp_path / "index", changes)
    with pytest.raises(ValueError, match=f"is not a readable index .*{words}"):
        SampleIndex.load(tmp_path / "index")


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": np.full((3, 2), -5, np.int32)},
        {"stamp_folders": pack_names([b"a\0b", b""]), "stamp_times": np.zeros(2, np.int64)},
        {"stamp_files": None},
        {"root": "/elsewhere"},
    ],
)
def test_a_kept_scan_that_is_wrong_is_made_anew(images: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    first = SampleIndex.from_folder(images, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    altered(file, change)
    again = SampleIndex.from_folder(images, cache=tmp_path / "cache")
    assert (again.sizes == first.sizes).all()
    assert (again.root, again.fingerprint) == (first.root, first.fingerprint)
    file.write_bytes(file.read_bytes()[:-5])
    assert SampleIndex.from_folder(images, cache=tmp_path / "cache").fingerprint == first.fingerprint
    assert SampleIndex.load(file).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 2**40},
        {"epoch": [1, 2]},
        {"writes": np.full(3, 2**33)},
        {"written_epoch": np.full(3, -7)},
        {"boxes": np.zeros((3, 1), np.float32)},
        {"weights": np.full((3, 1), np.inf)},
        {"fingerprint": "\ud800"},
    ],
)
def test_a_region_table_with_wrong_values_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "regions"
    columns = RegionTable(3).state_dict()
    facts = {name: columns.pop(name) for name in ("epoch", "fingerprint")}
    save_arrays(path, columns, facts)
    assert len(RegionTable.load(path)) == 3
    for name, value in change.items():
        (columns if isinstance(value, np.ndarray) else facts)[name] = value
    save_arrays(path, columns, facts)
    with pytest.raises(ValueError, match="not a readable region table"):
        RegionTable.load(path)


def test_a_jpeg_of_more_pixels_than_its_bytes_can_hold_is_left_out(images: Path) -> None:
    data = (images / "0000.jpg").read_bytes()
    sides = data.index(b"\xff\xc0") + 5
    (images / "0000.jpg").write_bytes(data[:sides] + (13_000).to_bytes(2, "big") * 2 + data[sides + 4 :])
    index = SampleIndex.from_folder(images, cache=False)
    (bad,) = index.left_out
    assert bad == ("0000.jpg", f"13000 x 13000 pixels, more than its {len(data)} bytes can hold")


def test_the_emptiest_jpeg_is_an_image(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    flat = Image.new("RGB", (6000, 6000), "grey")
    flat.save(tmp_path / "images" / "a.jpg", quality=1, optimize=True, progressive=True)
    assert len(SampleIndex.from_folder(tmp_path / "images", cache=False)) == 1


def test_names_that_leave_the_root_are_left_out_of_a_list(images: Path) -> None:
    (images / "list.txt").write_bytes(
        b"0000.jpg\n../images/0001.jpg\n../x.jpg\na/../../y.jpg\n0002.jpg\0.jpg\n"
    )
    index = SampleIndex.from_list(images / "list.txt", cache=False)
    reasons = [(path, reason.split(" /")[0]) for path, reason in index.left_out]
    assert len(index) == 1
    assert reasons == [
        ("../images/0001.jpg", "not below the root"),
        ("../x.jpg", "not below the root"),
        ("../y.jpg", "not below the root"),
        ("0002.jpg\0.jpg", "has a NUL in its name"),
    ]


def entry(number: int, name: Any, side: int = 50) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": side, "height": side}


def mark(*box: float, image: int = 0) -> dict[str, Any]:
    return {"image_id": image, "category_id": 1, "bbox": box}


def coco(root: Path, **changes: Any) -> SampleIndex:
    data = {
        "images": [entry(n, f"000{n}.jpg") for n in range(2)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [mark(1, 2, 3, 4)],
    }
    (root / "coco.json").write_text(json.dumps(data | changes))
    return SampleIndex.from_coco(root, root / "coco.json", cache=False)


def test_names_that_leave_the_root_are_left_out_of_a_coco_set_and_boxes_stay_with_their_images(images):
    names = ("../secret.jpg", "/etc/secret.jpg", "a\0b.jpg", "0001.jpg", f"{images}/0002.jpg", "0001.jpg")
    entries = [entry(n, name) for n, name in enumerate(names)]
    index = coco(images, images=entries, annotations=[mark(5, 0, 5, 5, image=3)])
    boxes = {index.path(row): len(index.truth(row)) for row in range(len(index))}
    assert boxes == {f"{images}/0001.jpg": 1, f"{images}/0002.jpg": 0}
    assert [path for path, _ in index.left_out] == sorted(names[:4], key=lambda name: name.replace("/", "\0"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": [entry(0, "0000.jpg", 0)]}, "not between 1"),
        ({"images": [entry(0, 7)]}, "TypeError"),
        ({"images": [entry(0, "\ud800.jpg")]}, "surrogates"),
        ({"images": [entry(0, "a.jpg"), entry(0, "b.jpg")]}, "twice"),
        ({"images": "0000.jpg"}, "not a COCO instances file"),
        ({"categories": [{"id": float("inf"), "name": "cat"}]}, "OverflowError"),
        ({"annotations": [mark(0, 0, float("nan"), 4)]}, "not between"),
        ({"annotations": [mark(0, 0, 10**400, 4)]}, "OverflowError"),
        ({"annotations": [mark(*[0] * 8)]}, "does not have 4 numbers"),
    ],
)
def test_a_coco_file_with_wrong_values_is_refused(images: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        coco(images, **changes)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe\xff", b"[]", b"", b"\0" * 99])
def test_what_is_no_coco_file_is_refused(images: Path, content: bytes) -> None:
    (images / "coco.json").write_bytes(content)
    with pytest.raises(ValueError, match="is not a COCO instances file"):
        SampleIndex.from_coco(images, images / "coco.json", cache=False)


def test_a_folder_or_an_image_is_no_list(images: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a file"):
        SampleIndex.from_list(images, cache=False)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        SampleIndex.from_coco(images, images, cache=False)
    with pytest.raises(ValueError, match=r"usable|names no file"):
        SampleIndex.from_list(images / "0000.jpg", cache=False)


def test_folders_full_of_links_to_each_other_are_walked_to_an_end(images: Path) -> None:
    for one in range(12):
        (images / "class" / str(one)).mkdir(parents=True)
        for other in range(12):
            (images / "class" / str(one) / str(other)).symlink_to(images / "class" / str(other))
    (images / "class" / "loop").symlink_to("loop")
    (images / "0000.jpg").rename(images / "class" / "5" / "a..b.jpg")
    index = SampleIndex.from_folder(images, cache=False)
    assert [index.path(row) for row in range(len(index))] == [str(images / "class" / "5" / "a..b.jpg")]


# -- configurations -------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n"
    for old, new in zip("abcdefghijklmno", "bcdefghijklmnop", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "anchors, aliases, tags, directives"),
        ("run: !!python/object/apply:os.mkdir [sprung]\n", "anchors, aliases, tags, directives"),
        ("run: " + "[" * 5000, "more than 20 nested sections"),
        ("- " * 5000, "more than 20 nested sections"),
        ("%YAML 1.1\n---\nrun: {amp: off}\n", "directives and"),
        ("method: {name: [1]}\nruns: 1\n", "runs is not a known key"),
        ("run: {out: a, epochs: " + "9" * 5000 + "}", "is not valid YAML"),
        ('run: {out: "\\ud800"}', "not valid Unicode"),
        ("[1]: 2", "instead of a word"),
        ("- run", "should hold sections"),
        ("x" * 10**6, "more than 50000 characters"),
    ],
)
def test_a_hostile_configuration_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "sprung").exists()


def test_a_configuration_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"run: \xff\xfe")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        load(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text(f"base: {'x' * 5000}.yaml")
    with pytest.raises(FileNotFoundError, match="named as base"):
        load(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="is not text"):
        parse(b"run: {}")  # type: ignore[arg-type]
