"""Packing: the copy is the same data set with bounded images, whatever happens on the way to it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import noise_images
from numpy.typing import NDArray
from PIL import Image
from tars import pack_folder, write_shard
from test_source import Table
from touches import killed_at_every_touch

from dali_views import SampleIndex, ViewLoader, recipes
from dali_views.data.names import unpack_names
from dali_views.tools.cli import main
from dali_views.tools.pack.folder import Packed, pack


def _folder(root: Path) -> SampleIndex:
    return SampleIndex.from_folder(root, cache=False, progress=False)


def _list(root: Path) -> SampleIndex:
    return SampleIndex.from_list(root / "list.txt", cache=False, progress=False)


def _pack(source: SampleIndex, to: Path, short_side: int = 32, instances: Path | None = None) -> Packed:
    return pack(source, to, short_side=short_side, workers=2, progress=False, instances=instances)


def _names(index: SampleIndex) -> list[str]:
    assert index.paths is not None
    return [os.fsdecode(name) for name in unpack_names(index.paths)]


def _files(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def _ramp(height: int, width: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom, both from 16 to 240; blue is their mean."""
    y, x = np.mgrid[:height, :width]
    red, green = 16 + 224 * (x + 0.5) / width, 16 + 224 * (y + 0.5) / height
    return Image.fromarray(np.rint(np.stack([red, green, (red + green) / 2], axis=2)).astype(np.uint8))


def _pixels(path: str | Path) -> NDArray[np.float64]:
    """(H, W, 3) as stored; not for turned TIFF."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.float64)


def _turn(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# -- the images -----------------------------------------------------------------------------------


def _save_turned(image: Image.Image, path: Path) -> None:
    image.save(path, tiffinfo={274: 6})


FORMATS: dict[str, Callable[[Image.Image, Path], None]] = {
    "plain.jpg": lambda image, path: image.save(path, quality=95),
    "progressive.JPEG": lambda image, path: image.save(path, quality=95, progressive=True),
    "turned.jpg": lambda image, path: image.save(path, quality=95, exif=_turn(6)),
    "cmyk.jpg": lambda image, path: image.convert("CMYK").save(path, quality=95),
    "plain.png": lambda image, path: image.save(path),
    "alpha.png": lambda image, path: image.convert("RGBA").save(path),
    "palette.png": lambda image, path: image.quantize(200).save(path),
    "lossy.webp": lambda image, path: image.save(path, quality=95),
    "plain.bmp": lambda image, path: image.save(path),
    "plain.ppm": lambda image, path: image.save(path),
    "plain.tif": lambda image, path: image.save(path),
    "turned.tif": _save_turned,
}


@pytest.mark.parametrize(("height", "width"), [(75, 100), (133, 41), (321, 1003)])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_shrunk_in_place_without_a_shift(tmp_path, name, height, width):
    (tmp_path / "source").mkdir()
    FORMATS[name](_ramp(height, width), tmp_path / "source" / name)
    packed = _pack(_folder(tmp_path / "source"), tmp_path / "copy", 40)
    assert (packed.written, packed.copied, packed.left_out) == (1, 0, {})
    index = _folder(tmp_path / "copy")
    scale = 40 / min(height, width)
    assert index.sizes.tolist() == [[round(height * scale), round(width * scale)]]
    pixels = _pixels(index.path(0))
    # A straight line through each ramp tells where the image's edges have come to lie, far finer than the
    # noise of single pixels. Three columns at the border are bent by the filter.
    for along, channel in ((1, 0), (0, 1)):
        ramp = pixels[..., channel].mean(axis=1 - along)
        side = len(ramp)
        place = (np.arange(side) + 0.5) / side
        slope, start = np.polyfit(place[3:-3], ramp[3:-3], 1)
        found = (np.array([16, 240]) - start) / slope
        assert np.abs(found - [0, 1]).max() * side < 0.3, (along, found)


def test_an_image_that_is_small_enough_is_not_enlarged_and_a_jpeg_is_copied_byte_for_byte(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    _ramp(20, 90).save(source / "small.jpg", quality=60, comment=b"kept", exif=_turn(3))
    _ramp(32, 32).save(source / "bound.jpeg", progressive=True)
    _ramp(20, 90).convert("L").save(source / "grey.jpg")
    _ramp(20, 90).convert("CMYK").save(source / "cmyk.jpg")
    _ramp(20, 90).save(source / "not what it says.jpg", "PNG")
    _ramp(20, 90).save(source / "tiny.png")
    packed = _pack(_folder(source), tmp_path / "copy")
    assert (packed.copied, packed.written, packed.kept) == (3, 3, 0)
    for name in ("small.jpg", "bound.jpeg", "grey.jpg"):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
    for name in ("cmyk.jpg", "not what it says.jpg", "tiny.jpg"):
        with Image.open(tmp_path / "copy" / name) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (90, 20))
    assert packed.bytes_before == sum(file.stat().st_size for file in source.iterdir())
    assert packed.bytes_after == sum(file.stat().st_size for file in (tmp_path / "copy").glob("*.jp*"))


def test_grey_stays_grey_and_sixteen_bits_become_the_eight_that_the_loader_decodes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    ramp = np.asarray(_ramp(64, 64).convert("L"))
    Image.fromarray(ramp.astype(np.uint16) * 257).save(source / "deep.png")
    Image.fromarray(ramp).save(source / "grey.png")
    Image.fromarray(ramp).convert("LA").save(source / "alpha.png")
    _pack(_folder(source), tmp_path / "copy", 64)
    for name in ("deep.jpg", "grey.jpg", "alpha.jpg"):
        with Image.open(tmp_path / "copy" / name) as image:
            assert image.mode == "L"
            assert np.abs(np.asarray(image).astype(int) - ramp).max() <= 3


def test_pixels_stay_as_stored_and_of_the_metadata_only_the_orientation_stays(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    exif = _turn(6)
    exif[0x010E] = "a long description " * 50
    _ramp(100, 80).save(source / "a.jpg", exif=exif, comment=b"comment", icc_profile=b"profile" * 100)
    _save_turned(_ramp(100, 80), source / "b.tif")
    _ramp(100, 80).save(source / "c.png", exif=_turn(8))
    _ramp(100, 80).save(source / "d.jpg", quality=95)
    _pack(_folder(source), tmp_path / "copy")
    straight = _pixels(tmp_path / "copy" / "d.jpg")
    for name, turn in (("a", 6), ("b", 6), ("c", 8), ("d", None)):
        with Image.open(tmp_path / "copy" / f"{name}.jpg") as image:
            assert dict(image.getexif()) == ({} if turn is None else {0x0112: turn})
            assert not {"comment", "icc_profile"} & set(image.info)
        assert np.abs(_pixels(tmp_path / "copy" / f"{name}.jpg") - straight).mean() < 2


def test_the_loader_makes_nearly_the_same_views_of_the_copy(photographs, tmp_path):
    source = _folder(photographs).subset([0, len(_folder(photographs)) - 1])
    _pack(source, tmp_path / "copy", 256)
    views = []
    for index in (source, _list(tmp_path / "copy")):
        whole = recipes.localisation(128)
        loader = ViewLoader(index, whole, 2, device="cpu", shuffle=False, rank=0, world=1)
        (batch,) = list(loader)
        views.append(batch.views[0].numpy())
    assert views[0].std() > 0.5
    assert np.abs(views[0] - views[1]).mean() < 0.06


# -- which images, in which order -----------------------------------------------------------------


def test_class_folders_give_the_same_labels_classes_and_order(tmp_path):
    for number, kind in enumerate(("cat", "dog/young", "dog/old", "10")):
        noise_images(tmp_path / "source" / kind, 3, seed=number)
    Image.new("RGB", (50, 60)).save(tmp_path / "source" / "cat" / "last.png")
    source = _folder(tmp_path / "source")
    packed = _pack(source, tmp_path / "copy")
    assert packed.written + packed.copied == len(source) == 13
    for index in (_folder(tmp_path / "copy"), _list(tmp_path / "copy")):
        assert index.labels.tolist() == source.labels.tolist()
        assert [name.rsplit(".", 1)[0] for name in _names(index)] == [
            name.rsplit(".", 1)[0] for name in _names(source)
        ]
        assert index.classes == source.classes
        assert index.sizes.min(axis=1).max() <= 32
        shape = source.sizes / source.sizes.min(axis=1, keepdims=True)
        assert np.abs(index.sizes / index.sizes.min(axis=1, keepdims=True) - shape).max() < 0.5 / 20


@pytest.mark.parametrize(
    "label", [lambda n: n % 3, lambda n: ["zebra", "ant", "bee"][n % 3], lambda n: n - 1]
)
def test_a_list_keeps_its_order_and_labels(tmp_path, label):
    noise_images(tmp_path / "source", 7)
    (tmp_path / "source" / "0003.jpg").rename(tmp_path / "source" / "#odd name.jpg")
    order = [4, 2, 0, 6, 5, 1]
    lines = [f"{number:04d}.jpg\t{label(number)}" for number in order] + [f"./#odd name.jpg\t{label(2)}"]
    (tmp_path / "source" / "list.txt").write_text("\n".join(lines))
    source = _list(tmp_path / "source")
    _pack(source, tmp_path / "copy")
    index = _list(tmp_path / "copy")
    assert _names(index) == _names(source)
    assert index.labels.tolist() == source.labels.tolist()
    assert index.classes == source.classes


def test_numbers_stand_in_the_list_where_names_would_be_numbered_anew(tmp_path):
    for number, kind in enumerate(("ant", "bee", "cow")):
        noise_images(tmp_path / "source" / kind, 2, seed=number)
    source = SampleIndex.from_folder(
        tmp_path / "source", cache=False, progress=False, classes=["cow", "ant", "bee"]
    )
    _pack(source, tmp_path / "copy")
    assert source.labels.tolist() == [1, 1, 2, 2, 0, 0]
    assert _list(tmp_path / "copy").labels.tolist() == [1, 1, 2, 2, 0, 0]


def test_names_that_would_collide_are_told_apart_and_none_is_lost(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    grey = {"a.bmp": 10, "a.jpg": 60, "a.png": 110, "a.png.jpg": 160, "b.png": 210, "b.webp": 250}
    for name, value in grey.items():
        Image.new("RGB", (20, 20), (value,) * 3).save(source / name, quality=95)
    _pack(_folder(source), tmp_path / "copy")
    found = {file.name: _pixels(file).mean() for file in (tmp_path / "copy").glob("*.jpg")}
    assert found == pytest.approx(
        {
            "a.jpg": 60,
            "a.bmp.jpg": 10,
            "a.png.jpg": 160,
            "a.png.1.jpg": 110,
            "b.jpg": 210,
            "b.webp.jpg": 250,
        },
        abs=2,
    )
    assert [_pixels(_list(tmp_path / "copy").path(row)).mean() for row in range(6)] == pytest.approx(
        [grey[name] for name in _names(_folder(source))], abs=2
    )


def test_members_of_shards_become_the_folder_that_the_shards_were_made_of(tmp_path):
    for number, kind in enumerate(("cat", "dog")):
        noise_images(tmp_path / "source" / kind, 6, seed=number)
    pattern = pack_folder(tmp_path / "source", tmp_path / "shards", 3)
    shards = SampleIndex.from_shards(pattern, cache=False, progress=False)
    _pack(_folder(tmp_path / "source"), tmp_path / "whole")
    _pack(shards, tmp_path / "copy")
    settings = {"pack.json": (tmp_path / "copy" / "pack.json").read_bytes()}
    assert _files(tmp_path / "copy") == _files(tmp_path / "whole") | settings
    (tmp_path / "copy" / "dog" / "0003.jpg").unlink()
    packed = _pack(shards, tmp_path / "copy")
    assert (packed.kept, packed.written) == (11, 1)
    assert _files(tmp_path / "copy") == _files(tmp_path / "whole") | settings


def test_a_source_becomes_a_folder_with_its_names_and_labels_in_a_list(tmp_path):
    images = [file.read_bytes() for file in sorted(noise_images(tmp_path / "source", 5).iterdir())]
    source = SampleIndex.from_source(Table(images), [1, 0, -1, 1, 0], ["ant", "bee"], progress=False)
    _pack(source, tmp_path / "copy", 500)
    index = _list(tmp_path / "copy")
    assert _names(index) == [f"row {row}.jpg" for row in range(5)]
    assert [index.encoded(row) for row in range(5)] == images
    assert (index.labels.tolist(), index.classes) == ([1, 0, -1, 1, 0], ["ant", "bee"])


def test_names_of_classes_that_are_too_large_for_numbers_are_written_as_numbers(tmp_path):
    noise_images(tmp_path / "source" / "20240101", 2)
    noise_images(tmp_path / "source" / "20240102", 2)
    _pack(_folder(tmp_path / "source"), tmp_path / "copy")
    assert _list(tmp_path / "copy").labels.tolist() == [0, 0, 1, 1]


# -- boxes ----------------------------------------------------------------------------------------


def _coco(root: Path) -> Path:
    """Images of 200 x 100, 30 x 20, 80 x 100 and one that is missing, with boxes, masks and key points."""
    root.mkdir()
    sizes = {"a.png": (200, 100), "b.jpg": (30, 20), "sub/c.jpg": (80, 100), "gone.jpg": (50, 50)}
    images, marks = [], []
    for number, (name, (width, height)) in enumerate(sizes.items()):
        images.append({"id": 7 * number, "file_name": name, "width": width, "height": height, "license": 3})
        if name != "gone.jpg":
            (root / name).parent.mkdir(exist_ok=True)
            _ramp(height, width).save(root / name)
        for kind, (x, y, w, h) in enumerate(((2, 3, 10, 8), (5, 1, 13.5, 17.25))):
            marks.append(
                {
                    "id": len(marks),
                    "image_id": 7 * number,
                    "category_id": 10 + kind,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h]],
                    "keypoints": [x, y, 2, x + w, y + h, 1],
                }
            )
        rle = {"size": [height, width], "counts": [0, height * width]}
        marks.append({"id": len(marks), "image_id": 7 * number, "category_id": 10, "bbox": [0, 0, 9, 9]})
        marks[-1] |= {"iscrowd": 1, "area": 81, "segmentation": rle}
    kinds = [{"id": 10, "name": "ant"}, {"id": 11, "name": "bee"}]
    file = root.parent / "truth.json"
    file.write_text(json.dumps({"info": {}, "images": images, "annotations": marks, "categories": kinds}))
    return file


def test_a_coco_file_is_scaled_with_its_images(tmp_path):
    truth = _coco(tmp_path / "source")
    source = SampleIndex.from_coco(tmp_path / "source", truth, cache=False, progress=False)
    with pytest.warns(UserWarning, match="2 run-length masks"):
        packed = _pack(source, tmp_path / "copy", 20, truth)
    assert packed.left_out == {"gone.jpg": "no such file"}
    index = SampleIndex.from_coco(
        tmp_path / "copy", tmp_path / "copy" / "instances.json", cache=False, progress=False
    )
    assert _names(index) == ["a.jpg", "b.jpg", "sub/c.jpg"]
    assert index.sizes.tolist() == [[20, 40], [20, 30], [25, 20]]
    assert index.left_out == []
    assert len(index.boxes) == 6
    np.testing.assert_allclose(index.boxes, source.boxes, atol=1e-6)
    assert index.box_start.tolist() == source.box_start.tolist()
    assert index.box_labels.tolist() == source.box_labels.tolist()
    assert index.labels.tolist() == source.labels.tolist() == _list(tmp_path / "copy").labels.tolist()

    before, after = (json.loads(f.read_text()) for f in (truth, tmp_path / "copy" / "instances.json"))
    assert after["categories"] == before["categories"]
    assert [entry["license"] for entry in after["images"]] == [3, 3, 3]
    marks = {mark["id"]: mark for mark in after["annotations"]}
    assert sorted(marks) == list(range(9))
    assert marks[0]["bbox"] == pytest.approx([0.4, 0.6, 2, 1.6])  # 200 x 100 became 40 x 20
    assert marks[0]["area"] == pytest.approx(3.2)
    assert marks[0]["segmentation"][0] == pytest.approx([0.4, 0.6, 2.4, 0.6, 2.4, 2.2])
    assert marks[0]["keypoints"] == pytest.approx([0.4, 0.6, 2, 2.4, 2.2, 1])
    assert "segmentation" not in marks[2]
    assert [marks[i] for i in (3, 4, 5)] == before["annotations"][3:6]  # of an image that was not shrunk


def test_a_coco_file_of_other_images_is_refused(tmp_path):
    truth = _coco(tmp_path / "source")
    other = _folder(noise_images(tmp_path / "other", 3))
    with pytest.raises(ValueError, match="names none"):
        _pack(other, tmp_path / "copy", instances=truth)
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(ValueError, match="not a COCO"):
        _pack(other, tmp_path / "copy", instances=tmp_path / "no.json")
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        _pack(other, tmp_path / "copy2", instances=tmp_path / "gone.json")


# -- interruptions --------------------------------------------------------------------------------


def test_killed_between_any_two_touches_of_the_disk_it_goes_on_to_the_same_files(tmp_path):
    for number, kind in enumerate(("cat", "dog")):
        noise_images(tmp_path / "source" / kind, 3, seed=number)
    source = _folder(tmp_path / "source")
    whole = _pack(source, tmp_path / "whole")
    call = "pack(source, out, short_side=32, workers=2, progress=False)"
    killed = killed_at_every_touch(call, tmp_path / "source", tmp_path / "killed")
    assert len(killed) > 30
    kept = []
    for folder in killed[::3] + killed[-3:]:
        packed = _pack(source, folder)
        assert _files(folder) == _files(tmp_path / "whole")
        assert packed.kept + packed.written + packed.copied == 6
        assert (packed.bytes_before, packed.bytes_after) == (whole.bytes_before, whole.bytes_after)
        kept.append(packed.kept)
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert kept[-1] == 6


def test_killed_by_another_process_the_command_goes_on_to_the_same_files(tmp_path, monkeypatch, capsys):
    source = noise_images(tmp_path / "source", 60, sizes=(500, 600))
    _pack(_folder(source), tmp_path / "whole", 256)
    command = [
        sys.executable,
        "-m",
        "dali_views",
        "pack",
        "--folder",
        str(source),
        str(tmp_path / "copy"),
        "--workers",
        "1",
    ]
    process = subprocess.Popen(command)
    while len(list((tmp_path / "copy").glob("*.jpg"))) < 5:
        with pytest.raises(subprocess.TimeoutExpired):  # it is still running
            process.wait(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(list((tmp_path / "copy").glob("*.jpg"))) < 60
    assert main(["pack", str(source), str(tmp_path / "copy"), "--folder"]) == 0
    assert _files(tmp_path / "copy") == _files(tmp_path / "whole")
    assert "finished before" in capsys.readouterr().out


# -- what is refused ------------------------------------------------------------------------------


def test_a_copy_with_other_settings_is_refused_and_left_alone(tmp_path):
    source = _folder(noise_images(tmp_path / "source", 6))
    _pack(source, tmp_path / "copy")
    before = _files(tmp_path / "copy")
    with pytest.raises(ValueError, match="short_side 32"):
        _pack(source, tmp_path / "copy", 33)
    with pytest.raises(ValueError, match="quality 90"):
        pack(source, tmp_path / "copy", short_side=32, quality=80, progress=False)
    with pytest.raises(ValueError, match="source"):
        _pack(source.subset(range(5)), tmp_path / "copy")
    assert _files(tmp_path / "copy") == before
    assert _pack(source, tmp_path / "copy").kept == 6


def test_a_folder_that_is_not_ours_or_lies_in_the_source_is_refused_and_left_alone(tmp_path):
    source = _folder(noise_images(tmp_path / "source", 3))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "source")
    before = _files(tmp_path)
    linked = _folder(tmp_path / "link")
    with pytest.raises(ValueError, match="in its source"):
        _pack(linked, tmp_path / "source" / "new")
    for place, word in (
        ("other", "other things"),
        ("source", "in its source"),
        ("source/new", "in its source"),
        ("link/new", "in its source"),
    ):
        with pytest.raises(ValueError, match=word):
            _pack(source, tmp_path / place)
    assert _files(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert _pack(source, tmp_path / "empty").written == 3


def test_two_processes_do_not_pack_to_one_folder(tmp_path):
    source = _folder(noise_images(tmp_path / "source", 3))
    (tmp_path / "copy").mkdir()
    handle = os.open(tmp_path / "copy", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="Another process"):
        _pack(source, tmp_path / "copy")
    os.close(handle)
    assert _pack(source, tmp_path / "copy").written == 3


@pytest.mark.parametrize("options", [{"short_side": 0}, {"quality": 0}, {"quality": 101}, {"workers": 0}])
def test_options_out_of_range_are_refused_before_anything_is_made(tmp_path, options):
    source = _folder(noise_images(tmp_path / "source", 1))
    with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        pack(source, tmp_path / "copy", progress=False, **options)
    assert not (tmp_path / "copy").exists()


def test_arrays_and_repeated_images_are_refused(tmp_path):
    with pytest.raises(TypeError, match="arrays"):
        _pack(SampleIndex.from_arrays(np.zeros((2, 8, 8, 3), np.uint8)), tmp_path / "copy")
    source = _folder(noise_images(tmp_path / "source", 2))
    with pytest.raises(ValueError, match=r"0001\.jpg.*2 times"):
        _pack(source.subset([0, 1, 1]), tmp_path / "copy")


# -- bad images -----------------------------------------------------------------------------------


def _damaged_png(path: Path) -> None:
    """A PNG whose header and end are right, and whose pixels are not."""
    file = io.BytesIO()
    _ramp(60, 60).save(file, "PNG")
    data = bytearray(file.getvalue())
    middle = len(data) // 2
    data[middle : middle + 50] = bytes(50)
    path.write_bytes(data)


def test_bad_images_are_told_with_their_reasons_and_cost_only_themselves(tmp_path):
    root = noise_images(tmp_path / "source", 6)
    _damaged_png(root / "damaged.png")
    (root / "empty.jpg").write_bytes(b"")
    source = _folder(root)
    assert len(source) == 7
    # These become bad after the index was made.
    (root / "0000.jpg").unlink()
    (root / "0001.jpg").write_bytes(b"P6 20000 20000 255\n")
    (root / "0002.jpg").write_bytes((root / "0003.jpg").read_bytes())
    packed = _pack(source, tmp_path / "copy")
    words = {
        "0000.jpg": "no such file",
        "0001.jpg": "limit of 178",
        "0002.jpg": "changed since",
        "damaged.png": "cannot be decoded",
        "empty.jpg": "empty file",
    }
    assert set(packed.left_out) == set(words)
    for name, word in words.items():
        assert word in packed.left_out[name]
    told = (tmp_path / "copy" / "left_out.txt").read_text().splitlines()
    assert dict(line.split("\t") for line in told) == packed.left_out
    assert packed.written == 3
    assert (
        _names(_folder(tmp_path / "copy"))
        == _names(_list(tmp_path / "copy"))
        == [
            "0003.jpg",
            "0004.jpg",
            "0005.jpg",
        ]
    )


def test_a_class_without_a_usable_image_is_told_and_the_list_keeps_the_labels(tmp_path):
    noise_images(tmp_path / "source" / "bee", 2)
    (tmp_path / "source" / "ant").mkdir()
    _damaged_png(tmp_path / "source" / "ant" / "only.png")
    source = _folder(tmp_path / "source")
    assert source.labels.tolist() == [0, 1, 1]
    with pytest.warns(UserWarning, match="ant"):
        _pack(source, tmp_path / "copy")
    assert _list(tmp_path / "copy").labels.tolist() == [1, 1]


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "source").mkdir()
    _damaged_png(tmp_path / "source" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png"):
        _pack(_folder(tmp_path / "source"), tmp_path / "copy")


def test_a_name_that_leads_out_of_the_folder_is_left_out_and_nothing_is_written_there(tmp_path):
    noise_images(tmp_path / "data" / "source", 2)
    noise_images(tmp_path / "data" / "beside", 1)
    (tmp_path / "data" / "source" / "list.txt").write_text("0000.jpg\n../beside/0000.jpg\n0001.jpg\n")
    source = _list(tmp_path / "data" / "source")
    assert len(source) == 2
    packed = _pack(source, tmp_path / "to" / "copy")
    assert list(packed.left_out) == ["../beside/0000.jpg"]
    assert [file.name for file in (tmp_path / "to").iterdir()] == ["copy"]
    assert _names(_list(tmp_path / "to" / "copy")) == ["0000.jpg", "0001.jpg"]


def test_a_name_too_long_for_a_file_costs_its_image(tmp_path):
    noise_images(tmp_path / "photos", 3)
    pictures = [file.read_bytes() for file in sorted((tmp_path / "photos").iterdir())]
    names = ["a.jpg", f"{'b' * 300}.jpg", f"{'é' * 124}.jpg"]
    shard = write_shard(tmp_path / "long.tar", zip(names, pictures, strict=True))
    index = SampleIndex.from_shards(shard, cache=False, progress=False)
    packed = _pack(index, tmp_path / "copy", 100)
    assert list(packed.left_out) == [f"long.tar/{names[1]}", f"long.tar/{names[2]}"]
    assert _names(_list(tmp_path / "copy")) == ["a.jpg"]


def test_what_cannot_be_written_is_an_error_and_no_bad_image(tmp_path):
    noise_images(tmp_path / "source" / "cat", 2)
    source = _folder(tmp_path / "source")
    _pack(source, tmp_path / "copy")
    for file in (tmp_path / "copy" / "cat").iterdir():
        file.unlink()
    (tmp_path / "copy" / "cat").rmdir()
    (tmp_path / "copy" / "cat").write_text("in the way")
    with pytest.raises(OSError, match="cat"):
        _pack(source, tmp_path / "copy")


def test_a_packed_file_that_something_else_has_damaged_is_found(tmp_path):
    source = _folder(noise_images(tmp_path / "source", 3))
    _pack(source, tmp_path / "copy")
    whole = _files(tmp_path / "copy")
    for data in (whole["0001.jpg"][:100], (tmp_path / "source" / "0001.jpg").read_bytes()):
        (tmp_path / "copy" / "0001.jpg").write_bytes(data)
        with pytest.raises(RuntimeError, match=r"0001\.jpg"):
            _pack(source, tmp_path / "copy")
        (tmp_path / "copy" / "0001.jpg").unlink()
        _pack(source, tmp_path / "copy")
        assert _files(tmp_path / "copy") == whole


# -- the command ----------------------------------------------------------------------------------


def test_the_command_packs_and_tells_what_it_did(tmp_path, monkeypatch, capsys):
    root = noise_images(tmp_path / "source", 5, sizes=(60, 90))
    _ramp(20, 20).save(root / "small.jpg")
    (root / "bad.jpg").write_text("no image")
    before = _files(root)
    command = ["pack", str(root), str(tmp_path / "copy"), "--folder", "--short-side", "48", "--quality", "70"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "6 images: 5 re-encoded, 1 copied as they are; 1 left out" in told
    assert "bad.jpg: not an image" in told
    assert "left_out.txt" in told
    index = _folder(tmp_path / "copy")
    assert index.sizes.min(axis=1).tolist() == [48] * 5 + [20]
    assert _files(root) == before
    assert main([*command[:-1], "75"]) == 2
    assert "quality 70" in capsys.readouterr().err


def test_the_command_scales_a_coco_file(tmp_path, monkeypatch, capsys):
    truth = _coco(tmp_path / "source")
    copy = tmp_path / "copy"
    command = ["pack", str(tmp_path / "source"), str(copy), "--coco", str(truth), "--short-side", "20"]
    assert main([*command, "--folder"]) == 0
    assert "run-length masks" in capsys.readouterr().err
    assert main(["index", str(copy), "--coco", str(copy / "instances.json")]) == 0
    assert "6 ground-truth boxes on 3 images" in capsys.readouterr().out
