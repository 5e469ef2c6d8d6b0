"""SampleIndex: order, labels, boxes, refused files, cache."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from dali_views import bad_list
from dali_views.data.index import SampleIndex
from dali_views.data.scan import LeftOut
from dali_views.graph.decode import decoder


def _image(path: Path, height: int = 12, width: int = 16, mode: str = "RGB", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)  # type: ignore[arg-type]
    return path


def _names(index: SampleIndex) -> list[str]:
    return [os.path.relpath(index.path(i), index.root) for i in range(len(index))]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes; one image lies deeper, one has spaces and an accent in its name."""
    root = tmp_path / "tree"
    _image(root / "b" / "2.JPG", 10, 20)
    _image(root / "b" / "sub" / "1.png", 30, 40)
    _image(root / "a-b" / "x.jpg")
    _image(root / "a" / "été à la mer.jpg")
    (root / "a" / "notes.txt").write_text("not listed")
    return root


def test_class_folders_are_numbered_in_order_and_hold_what_lies_below_them(tree: Path) -> None:
    index = SampleIndex.from_folder(tree, cache=False)
    assert index.classes == ["a", "a-b", "b"]
    assert _names(index) == ["a/été à la mer.jpg", "a-b/x.jpg", "b/2.JPG", "b/sub/1.png"]
    assert index.labels.tolist() == [0, 1, 2, 2]
    assert index.sizes.tolist() == [[12, 16], [12, 16], [10, 20], [30, 40]]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    _image(tmp_path / "b.jpg")
    _image(tmp_path / "a.bmp")
    (tmp_path / "empty").mkdir()
    index = SampleIndex.from_folder(tmp_path, cache=False)
    assert _names(index) == ["a.bmp", "b.jpg"]
    assert (index.labels.tolist(), index.classes) == ([-1, -1], [])


def test_images_beside_class_folders_are_reported_and_linked_folders_are_followed_once(tree: Path) -> None:
    _image(tree / "stray.jpg")
    (tree / "c").symlink_to(tree / "b")
    (tree / "b" / "loop").symlink_to(tree / "b")
    index = SampleIndex.from_folder(tree, cache=False)
    assert index.left_out == [LeftOut("stray.jpg", "lies beside the class folders")]
    assert index.classes == ["a", "a-b", "b", "c"]
    assert np.bincount(index.labels).tolist() == [1, 1, 2, 2]


def test_chosen_classes_are_numbered_as_given(tree: Path) -> None:
    index = SampleIndex.from_folder(tree, cache=False, classes=["b", "a"])
    assert index.classes == ["b", "a"]
    assert index.labels.tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="zebra"):
        SampleIndex.from_folder(tree, cache=False, classes=["zebra"])


def test_missing_and_empty_folders_are_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SampleIndex.from_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no image"):
        SampleIndex.from_folder(tmp_path, cache=False)


def test_worker_processes_and_threads_agree(tree: Path) -> None:
    (tree / "a" / "bad.jpg").write_bytes(b"")
    here = SampleIndex.from_folder(tree, cache=False, processes=0)
    there = SampleIndex.from_folder(tree, cache=False, processes=2)
    assert there.fingerprint == here.fingerprint
    assert there.left_out == here.left_out == [LeftOut("a/bad.jpg", "empty file")]


def jpeg_in_tiff(file: Path) -> None:
    """A TIFF whose pixels, a JPEG in one strip, reach to its end; their length is not told."""
    jpeg = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96), np.uint8)).save(jpeg, "JPEG")
    tags = (
        (256, 96),
        (257, 64),
        (258, 8),
        (259, 7),
        (262, 1),
        (273, 8 + 2 + 12 * 8 + 4),
        (277, 1),
        (278, 64),
    )
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    file.write_bytes(b"II*\0" + struct.pack("<IH", 8, 8) + entries + bytes(4) + jpeg.getvalue())


def _zoo(root: Path) -> dict[str, str]:
    """Writes good and bad files; returns a word of the expected reason by name, "" for good ones."""
    jpeg = _image(root / "plain.jpg", 24, 32).read_bytes()
    png = _image(root / "plain.png", 24, 32).read_bytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode in ("L.jpg", "CMYK.jpg", "1.png", "L.png", "LA.png", "P.png", "RGBA.png"):
        _image(root / mode, mode=mode.partition(".")[0])
    for name in ("x.bmp", "x.webp", "x.tif", "x.ppm"):
        _image(root / name)
    Image.fromarray(np.full((9, 7), 40_000, np.uint16)).save(root / "grey16.png")
    _image(root / "progressive.jpg", progressive=True, exif=exif)
    _image(root / "turned.tif", tiffinfo={274: 6})
    (root / "png named.jpg").write_bytes(png)
    (root / "junk after.jpg").write_bytes(jpeg + b"junk" * 1000)
    (root / "junk for the end.jpg").write_bytes(jpeg[:-2] + b"junk" * 1000)
    out = dict.fromkeys(os.listdir(root), "")
    for number in range(8):
        _image(root / f"exif {number}.webp", 20, 20 + number, lossless=True, exif=exif)
        odd = (root / f"exif {number}.webp").read_bytes()[34] % 2
        out[f"exif {number}.webp"] = "behind a chunk of odd length" if odd else ""
    assert sum(map(bool, out.values())) in range(1, 8)  # some odd, some even
    for name in ("x.bmp", "x.webp", "x.tif", "x.ppm"):
        whole = (root / name).read_bytes()
        (root / f"cut {name}").write_bytes(whole[: len(whole) * 2 // 3])
        out[f"cut {name}"] = "truncated"
    gif = io.BytesIO()
    Image.new("P", (4, 4)).save(gif, "GIF")
    cmyk = (root / "CMYK.jpg").read_bytes()
    marker = cmyk.index(b"Adobe") - 4
    for name, content, word in (
        ("empty.jpg", b"", "empty"),
        ("text.jpg", b"hello", "not an image"),
        ("cut.jpg", jpeg[: len(jpeg) // 2], "truncated"),
        ("no end.jpg", jpeg[:-2], "truncated"),
        ("cut.png", png[: len(png) // 2], "truncated"),
        ("no end.png", png[:-12], "truncated"),
        ("gif.jpg", gif.getvalue(), "GIF"),
        ("text.ppm", b"P3 2 1 255 1 2 3 4 5 6 ", "text"),
        ("huge.ppm", b"P6 18000 10000 255\n", "limit"),
        ("dim.ppm", b"P6 2 1 100\n123456", "maximum 100"),
        ("cmyk unmarked.jpg", cmyk[:marker] + cmyk[marker + 16 :], "Adobe"),
    ):
        (root / name).write_bytes(content)
        out[name] = word
    thumbnail = io.BytesIO()
    Image.new("RGB", (16, 12)).save(thumbnail, "JPEG")
    _image(root / "thumb.jpg", 64, 96, exif=b"Exif\0\0" + thumbnail.getvalue())
    whole = (root / "thumb.jpg").read_bytes()
    (root / "thumb cut.jpg").write_bytes(whole[: (whole.index(b"\xff\xda", 1000) + len(whole)) // 2])
    out |= {"thumb.jpg": "", "thumb cut.jpg": "truncated"}
    for name, bits in (("555.bmp", ()), ("565.bmp", (0xF800, 0x7E0, 0x1F))):
        masks = struct.pack(f"<{len(bits)}I", *bits)
        start = struct.pack("<IiiHHI20x", 40, 6, 5, 1, 16, 3 if bits else 0) + masks
        place = 14 + len(start)
        (root / name).write_bytes(
            b"BM" + struct.pack("<IxxxxI", place + 60, place) + start + bytes(range(60))
        )
        out[name] = "16 bits"
    _image(root / "alpha.tif", mode="RGBA")
    alpha = (root / "alpha.tif").read_bytes()
    tag = alpha.index(struct.pack("<HHI", 338, 3, 1)) + 8
    (root / "associated.tif").write_bytes(alpha[:tag] + b"\1" + alpha[tag + 1 :])
    jpeg_in_tiff(root / "jpeg.tif")
    (root / "jpeg cut.tif").write_bytes((root / "jpeg.tif").read_bytes()[:-40])
    out |= {"alpha.tif": "", "associated.tif": "associated", "jpeg.tif": "", "jpeg cut.tif": "missing"}
    _image(root / "float.tif", mode="F")
    (root / "link.jpg").symlink_to(root / "nothing")
    os.mkfifo(root / "pipe.jpg")
    return out | {"float.tif": "mode F", "link.jpg": "no such file", "pipe.jpg": "regular"}


def test_every_file_is_in_the_index_or_left_out_with_its_reason(tmp_path: Path) -> None:
    expected = _zoo(tmp_path)
    index = SampleIndex.from_folder(tmp_path, cache=False)
    assert set(_names(index)) == {name for name, reason in expected.items() if not reason}
    reasons = dict(index.left_out)
    assert {name for name, reason in expected.items() if reason} == set(reasons)
    for name, reason in reasons.items():
        assert expected[name] in reason, (name, reason)


def test_the_summary_tells_sizes_and_the_first_twenty_left_out(tmp_path: Path) -> None:
    for number, height in enumerate((10, 20, 90)):
        _image(tmp_path / f"{number}.jpg", height, 30)
    for number in range(23):
        (tmp_path / f"empty {number:02d}.jpg").write_bytes(b"")
    lines = SampleIndex.from_folder(tmp_path, cache=False).summary().splitlines()
    assert lines[:3] == [
        f"3 images in 0 classes ({tmp_path}), 3 without a label",
        "height x width: median 20 x 30, largest 90 x 30",
        "23 files left out:",
    ]
    assert lines[22:] == ["  empty 19.jpg: empty file", "  and 3 more"]


def test_the_summary_tells_when_a_folder_too_high_was_named(tmp_path: Path) -> None:
    for part in ("train2017", "val2017"):
        _image(tmp_path / part / "a.jpg")
    told = "named like parts of a data set (train2017, val2017)"
    assert told in SampleIndex.from_folder(tmp_path, cache=False).summary()
    _image(tmp_path / "trainers" / "a.jpg")  # a class as any other
    assert "parts" not in SampleIndex.from_folder(tmp_path, cache=False).summary()


def test_dali_decodes_what_is_kept_to_the_stored_size_and_fails_on_the_truncated(tmp_path: Path) -> None:
    def decode(path: str) -> NDArray[np.uint8]:
        data = np.fromfile(path, np.uint8)
        return np.asarray(decoder(1, 1, "cpu", None).run(images=[data])[0].at(0))

    _zoo(tmp_path)
    index = SampleIndex.from_folder(tmp_path, cache=False)
    for row in range(len(index)):
        pixels = decode(index.path(row))
        assert pixels.shape[:2] == tuple(index.sizes[row]), index.path(row)
        with Image.open(index.path(row)) as image:
            if image.mode != "I;16" and image.format != "TIFF":
                gap = np.abs(pixels.astype(int) - np.asarray(image.convert("RGB")))
                assert gap.max() <= 2, index.path(row)
    for path, reason in index.left_out:
        if "truncated" in reason:
            with pytest.raises(RuntimeError):
                decode(str(tmp_path / path))


def test_a_list_gives_paths_with_spaces_and_labels_by_word(tree: Path) -> None:
    _image(tree / "two words.jpg")
    file = tree / "list.txt"
    file.write_text(
        f"\ufeff# a comment\n\na/été à la mer.jpg\tsea\nb/2.JPG dog\n{tree}/b/sub/1.png sea\n"
        "two words.jpg\na-b/x.jpg cat\nb/2.JPG cat\ngone.jpg dog\n/elsewhere/y.jpg dog\n"
    )
    index = SampleIndex.from_list(file, cache=False)
    assert _names(index) == ["a/été à la mer.jpg", "b/2.JPG", "b/sub/1.png", "two words.jpg", "a-b/x.jpg"]
    assert index.classes == ["cat", "dog", "sea"]
    assert index.labels.tolist() == [2, 1, 2, -1, 0]
    reasons = dict(index.left_out)
    assert reasons["gone.jpg"] == "no such file"
    assert "twice" in reasons["b/2.JPG"]
    assert "not below" in reasons["/elsewhere/y.jpg"]


def test_numbers_in_a_list_are_the_labels(tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("b/2.JPG 5\na-b/x.jpg\t0\n")
    index = SampleIndex.from_list(file, root=tree, cache=False)
    assert index.labels.tolist() == [5, 0]
    assert index.classes == ["0", "1", "2", "3", "4", "5"]
    file.write_text("b/2.JPG -7\n")
    with pytest.raises(ValueError, match="-1"):
        SampleIndex.from_list(file, root=tree, cache=False)


def _coco(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        _image(tmp_path / "images" / name, 20, 40)
    marks = [
        {"image_id": 7, "category_id": 90, "bbox": [4, 5, 8, 10]},
        {"image_id": 7, "category_id": 3, "bbox": [20, 0, 60, 20]},
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 40, 20], "iscrowd": 1},
        {"image_id": 9, "category_id": 90, "bbox": [0, 0, 10, 10]},
        {"image_id": 9, "category_id": 3, "bbox": [1, 1, 0, 5]},
        {"image_id": 5, "category_id": 3, "bbox": [1, 1, 5, 5]},
    ]
    images = {9: "3.jpg", 7: "1.jpg", 8: "2.jpg", 5: "0 gone.jpg"}
    data = {
        "images": [{"id": i, "file_name": n, "height": 20, "width": 40} for i, n in images.items()],
        "categories": [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}],
        "annotations": marks,
    }
    (tmp_path / "instances.json").write_text(json.dumps(data))
    return tmp_path / "images", tmp_path / "instances.json"


def test_coco_boxes_are_fractions_and_the_largest_gives_the_label(tmp_path: Path) -> None:
    index = SampleIndex.from_coco(*_coco(tmp_path), cache=False)
    assert _names(index) == ["1.jpg", "2.jpg", "3.jpg"]
    assert index.classes == ["car", "brush"]
    assert index.labels.tolist() == [0, -1, 1]
    np.testing.assert_allclose(index.truth(0), [[0.25, 0.1, 0.75, 0.3], [0, 0.5, 1, 1]], atol=1e-6)
    assert index.truth(1).shape == (0, 4)
    assert index.truth(-1).tolist() == [[0, 0, 0.5, 0.25]]
    assert index.box_labels.tolist() == [1, 0, 1]
    assert index.left_out == [LeftOut("0 gone.jpg", "no such file")]


def test_arrays_are_not_copied_and_bad_ones_are_refused() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 9, 3), dtype=np.uint8)
    index = SampleIndex.from_arrays(pixels, [0, 1, 1, -1, 2])
    assert index.arrays is pixels
    assert index.sizes.tolist() == [[8, 9]] * 5
    assert index.classes == ["0", "1", "2"]
    assert SampleIndex.from_arrays(pixels).labels.tolist() == [-1] * 5
    changed = pixels.copy()
    changed[4, 7, 8, 2] ^= 1
    assert SampleIndex.from_arrays(changed).fingerprint != index.fingerprint
    with pytest.raises(TypeError, match="float"):
        SampleIndex.from_arrays(pixels / 255)  # type: ignore[arg-type]
    for words, wrong in (
        ("shape", {"images": pixels.transpose(0, 3, 1, 2)}),
        ("shape", {"labels": [0, 1]}),
        ("between", {"labels": [0, 1, 2, 3, 4], "classes": ["a"]}),
    ):
        with pytest.raises(ValueError, match=words):
            SampleIndex.from_arrays(**{"images": pixels, **wrong})


def test_boxes_attach_by_path_or_by_unique_name(tree: Path) -> None:
    plain = SampleIndex.from_folder(tree, cache=False)
    boxes: dict[str, ArrayLike] = {
        "b/2.JPG": [0, 0, 0.5, 0.5],
        "1.png": np.array([[0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]]),
        "?": np.zeros((0, 4)),
    }
    index = plain.with_boxes(boxes)
    assert [len(index.truth(i)) for i in range(4)] == [0, 0, 1, 2]
    assert index.box_labels.tolist() == [2, 2, 2]
    assert len(plain.boxes) == 0
    assert index.fingerprint == plain.fingerprint
    with pytest.raises(ValueError, match="None of the 1 names"):
        plain.with_boxes({"nobody.jpg": [0, 0, 1, 1]})
    with pytest.raises(ValueError, match="not a rectangle"):
        plain.with_boxes({"2.JPG": [0, 0, 1, 2]})


def test_box_files_are_inclusive_pixels(tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "boxes.txt"
    file.write_text("2.JPG\tn0001\t0\t5\t19\t9\nété à la mer.jpg 4 3 7 5\n")
    index = SampleIndex.from_folder(tree, cache=False).with_boxes(file)
    np.testing.assert_allclose(index.truth(2), [[0.5, 0, 1, 1]])
    np.testing.assert_allclose(index.truth(0), [[0.25, 0.25, 0.5, 0.5]])
    file.write_text("2.JPG 1 2 three 4\n")
    with pytest.raises(ValueError, match="Line 1"):
        index.with_boxes(file)


def test_a_subset_keeps_rows_together_with_their_boxes(tmp_path: Path) -> None:
    index = SampleIndex.from_coco(*_coco(tmp_path), cache=False)
    part = index.subset([2, 0])
    assert _names(part) == ["3.jpg", "1.jpg"]
    assert part.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(part.truth(0), index.truth(2))
    np.testing.assert_array_equal(part.truth(1), index.truth(0))
    assert part.subset(np.array([False, True])).fingerprint == index.subset([0]).fingerprint
    with pytest.raises(ValueError, match="at least one"):
        index.subset([])


def test_the_fingerprint_depends_on_paths_and_sizes_but_not_on_the_root(tree: Path, tmp_path: Path) -> None:
    first = SampleIndex.from_folder(tree, cache=False).fingerprint
    shutil.copytree(tree, tmp_path / "copy")
    assert SampleIndex.from_folder(tmp_path / "copy", cache=False).fingerprint == first
    _image(tmp_path / "copy" / "b" / "2.JPG", 11, 20)
    assert SampleIndex.from_folder(tmp_path / "copy", cache=False).fingerprint != first
    index = SampleIndex.from_folder(tree, cache=False)
    short = index.subset([1, 2])  # the longest name is gone
    (tree / "a" / "été à la mer.jpg").unlink()
    (tree / "b" / "sub" / "1.png").unlink()
    assert short.fingerprint == SampleIndex.from_folder(tree, cache=False).fingerprint


def test_save_and_load_give_the_same_index(tmp_path: Path) -> None:
    index = SampleIndex.from_coco(*_coco(tmp_path), cache=False)
    index.save(tmp_path / "index.safetensors")
    again = SampleIndex.load(tmp_path / "index.safetensors")
    for name in ("paths", "sizes", "labels", "box_start", "boxes", "box_labels"):
        np.testing.assert_array_equal(getattr(again, name), getattr(index, name))
    for name in ("root", "classes", "left_out", "fingerprint", "arrays"):
        assert getattr(again, name) == getattr(index, name)
    assert [p.name for p in tmp_path.glob(".*")] == []
    with pytest.raises(FileNotFoundError, match="none"):
        SampleIndex.load(tmp_path / "none")


def test_only_new_and_changed_files_are_read_again(tmp_path: Path) -> None:
    root = tmp_path / "images"
    status = _image(root / "a.bmp", 12, 16).stat()
    (root / "broken.jpg").write_text("hello")
    (root / "list.txt").write_text("a.bmp 0\n")

    def scan(cache: bool | Path = tmp_path / "cache") -> SampleIndex:
        listed = SampleIndex.from_list(root / "list.txt", cache=cache)
        index = SampleIndex.from_folder(root, cache=cache)
        assert listed.sizes.tolist() == index.sizes[:1].tolist()
        return index

    first = scan()
    # Other bytes of the same length and time: a change that a stored scan cannot see.
    _image(root / "a.bmp", 16, 12)
    os.utime(root / "a.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))
    second = scan()
    assert second.sizes.tolist() == first.sizes.tolist() == [[12, 16]]
    assert second.left_out == first.left_out
    assert [reason for _, reason in second.left_out] == ["not an image, or truncated in its header"]
    assert scan(False).sizes.tolist() == [[16, 12]]
    _image(root / "b.jpg", 30, 30)
    os.utime(root, ns=(1, 1))  # never the same tick as the scan
    assert scan().sizes.tolist() == [[12, 16], [30, 30]]
    (root / "b.jpg").unlink()
    assert len(scan()) == 1
    os.utime(root / "a.bmp", ns=(5, 5))
    assert scan().sizes.tolist() == [[16, 12]]
    _image(root / "broken.jpg", 7, 8)
    assert (scan().sizes.tolist(), scan().left_out) == ([[16, 12], [7, 8]], [])


def test_the_cache_folder_follows_the_environment(tree, tmp_path, monkeypatch):
    for name, folder in (("DALI_VIEWS_CACHE", "own"), ("XDG_CACHE_HOME", "xdg/dali_views")):
        monkeypatch.delenv("DALI_VIEWS_CACHE", raising=False)
        monkeypatch.setenv(name, str(tmp_path / folder.partition("/")[0]))
        SampleIndex.from_folder(tree)
        assert len(list((tmp_path / folder).glob("*.safetensors"))) == 1


def test_a_cache_that_cannot_be_written_costs_a_warning(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="not kept"):
        index = SampleIndex.from_folder(tree, cache=tmp_path / "file" / "cache")
    assert len(index) == 4


@pytest.mark.parametrize(
    "bad",
    ["#1.jpg", "2.jpg\n3.jpg", "\n2.jpg", "\r2.jpg", "2.jpg\ttab.jpg", '{"path": "2.jpg"}\t.jpg', "{2.jpg"],
)
@pytest.mark.parametrize("reason", ["ugly", ""])
def test_a_list_of_bad_files_leaves_out_those_and_no_other_whatever_their_names(
    tmp_path: Path, bad: str, reason: str
) -> None:
    good = {"2.jpg", "3.jpg"}
    for name in (bad, *good):
        _image(tmp_path / "images" / name)
    images = SampleIndex.from_folder(tmp_path / "images", cache=False)
    for path in (bad, os.path.join(images.root, bad)):
        bad_list.save(tmp_path / "bad.txt", {path: reason, "2.gif": "a name as others have"})
        assert set(_names(images.without(tmp_path / "bad.txt"))) == good
        assert set(bad_list.load(tmp_path / "bad.txt")) == {path, "2.gif"}


def test_lists_of_earlier_versions_and_by_hand_are_read(tmp_path: Path) -> None:
    old = (
        b'# by hand\n\n./#1.jpg\tugly\r\na\tb.jpg\tcut off\n{"path": 1}\tnone\n{odd.jpg\n\xff.jpg\tblurred\n'
    )
    (tmp_path / "bad.txt").write_bytes(old)
    assert bad_list.load(tmp_path / "bad.txt") == {
        "./#1.jpg": "ugly", "a\tb.jpg": "cut off", '{"path": 1}': "none", "\udcff.jpg": "blurred",
        "{odd.jpg": "on the list of files to leave out",
    }  # fmt: skip


@pytest.mark.parametrize("make", [SampleIndex.from_folder, SampleIndex.from_list, SampleIndex.from_shards])
def test_a_misspelt_option_of_a_scan_is_refused(make, tmp_path):
    place = tmp_path / ("a.tar" if make == SampleIndex.from_shards else "list.txt")
    place.write_bytes(b"a.jpg")
    with pytest.raises(TypeError, match="no option cach; its options are cache, processes, progress"):
        make(tmp_path if make == SampleIndex.from_folder else place, cach=False)
