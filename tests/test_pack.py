"""Packing: the shards are the same data set, whatever it came from and whatever happened on the way."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import noise_images
from numpy.typing import NDArray
from PIL import Image
from tars import pack_folder, write_shard
from test_source import Table
from touches import killed_at_every_touch

from dali_views import SampleIndex, SourceGoneError, ViewLoader, bad_list, recipes
from dali_views.data.listing import number_labels
from dali_views.tools.cli import main
from dali_views.tools.pack import Packed, pack_shards
from dali_views.tools.pack.image import label_words, shard_keys
from dali_views.tools.scenes import make_scenes

KINDS = ("ant", "bee", "cow")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images each; the last of a class is a PNG."""
    folder = tmp_path_factory.mktemp("photos")
    for seed, kind in enumerate(KINDS):
        noise_images(folder / kind, 8, seed=seed)
        with Image.open(folder / kind / "0007.jpg") as image:
            image.save(folder / kind / "0007.png")
        (folder / kind / "0007.jpg").unlink()
    return folder


@pytest.fixture
def source(photos: Path) -> SampleIndex:
    return from_folder(photos)


def from_folder(folder: Path, **options: Any) -> SampleIndex:
    return SampleIndex.from_folder(folder, cache=False, progress=False, **options)


def from_shards(folder: Path) -> SampleIndex:
    return SampleIndex.from_shards(folder / "*.tar", cache=False, progress=False)


def pack(source: SampleIndex, folder: Path, per_shard: int = 5, **options: Any) -> Packed:
    return pack_shards(source, folder, per_shard=per_shard, progress=False, **{"workers": 2, **options})


def encoded(index: SampleIndex) -> list[bytes]:
    return [index.encoded(row) for row in range(len(index))]


def members(folder: Path) -> dict[str, bytes]:
    """Content of all members by name, in the order of the shards."""
    found: dict[str, bytes] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                assert member.name not in found
                found[member.name] = content.read()
    return found


def opened(folder: Path) -> dict[str, Image.Image]:
    """The images among the members, by name."""
    held = members(folder)
    return {name: Image.open(io.BytesIO(held[name])) for name in held if not name.endswith(".cls")}


def files(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def touched(root: Path) -> dict[str, tuple[int, int]]:
    """Which file each shard is, and when it was written."""
    status = {shard.name: shard.stat() for shard in root.glob("*.tar")}
    return {name: (one.st_ino, one.st_mtime_ns) for name, one in status.items()}


def damaged_png() -> bytes:
    """A PNG whose header and end are right, and whose pixels are not."""
    file = io.BytesIO()
    Image.effect_noise((60, 60), 50).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    return bytes(data)


# -- the same data set ----------------------------------------------------------------------------


def of_list(photos: Path, folder: Path) -> SampleIndex:
    names = [f"{kind}/000{n}.jpg" for n in (4, 0, 6) for kind in ("cow", "ant", "bee")]
    lines = [f"{name}\t{n % 4 - 1}\n" for n, name in enumerate(names)]
    (folder / "list.txt").write_text("".join(lines))
    return SampleIndex.from_list(folder / "list.txt", photos, cache=False, progress=False)


def of_shards(photos: Path, folder: Path) -> SampleIndex:
    return SampleIndex.from_shards(pack_folder(photos, folder / "others", 3), cache=False, progress=False)


def of_table(photos: Path, folder: Path) -> SampleIndex:
    images = [file.read_bytes() for file in sorted(photos.rglob("*.*g"))]
    labels, names = np.arange(len(images)) % 3, [f"https://host/{n:02d}" for n in range(len(images))]
    return SampleIndex.from_source(Table(images, arrays=True), labels, KINDS, names=names, progress=False)


SOURCES: dict[str, Callable[[Path, Path], SampleIndex]] = {
    "folder": lambda photos, _: from_folder(photos),
    "reordered": lambda photos, _: from_folder(photos, classes=["cow", "bee", "ant"]),
    "unlabelled": lambda photos, _: from_folder(photos / "bee"),
    "part": lambda photos, _: from_folder(photos).subset([20, 3, 3, 9, 3]),
    "list": of_list,
    "shards": of_shards,
    "table": of_table,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_shards_of_any_index_hold_its_images_labels_and_order(photos, tmp_path, kind):
    index = SOURCES[kind](photos, tmp_path)
    packed = pack(index, tmp_path / "packed")
    again = from_shards(tmp_path / "packed")
    assert encoded(again) == encoded(index)
    assert again.labels.tolist() == index.labels.tolist()
    assert np.array_equal(again.sizes, index.sizes)
    assert again.left_out == []
    assert len(list((tmp_path / "packed").glob("*.tar"))) == packed.shards == -(-len(index) // 5)
    assert (packed.images, packed.left_out) == (len(index), {})
    if kind in ("folder", "shards", "table"):
        assert again.classes == index.classes


def test_pixels_become_png_without_a_loss(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (23, 9, 11, 3), dtype=np.uint8)
    index = SampleIndex.from_arrays(pixels, np.arange(23) % 4)
    pack(index, tmp_path / "packed")
    again = from_shards(tmp_path / "packed")
    assert np.array_equal([np.asarray(image) for image in opened(tmp_path / "packed").values()], pixels)
    assert (again.labels.tolist(), again.classes) == (index.labels.tolist(), index.classes)
    assert list(members(tmp_path / "packed"))[:3] == ["00.png", "00.cls", "01.png"]


def test_true_boxes_stand_in_a_list_that_fits_the_shards_also_of_shrunk_images(tmp_path):
    index = SampleIndex.from_coco(*make_scenes(tmp_path / "scenes", 12, (48, 64)), cache=False)
    pack(index, tmp_path / "packed", short_side=32)
    shards = from_shards(tmp_path / "packed")
    assert shards.sizes.min() == 32
    again = shards.with_boxes(tmp_path / "packed" / "boxes.txt")
    assert again.box_start.tolist() == index.box_start.tolist()
    np.testing.assert_allclose(again.boxes, index.boxes, atol=1e-6)


def test_equal_images_give_equal_files_without_time_and_user_however_many_threads_there_are(
    photos, source, tmp_path
):
    copied = shutil.copytree(photos, tmp_path / "elsewhere")
    for file in copied.rglob("*.*g"):
        os.utime(file, (1, 1))
    for name, index, workers in (("one", source, 1), ("other", from_folder(copied), 5)):
        pack(index, tmp_path / name, short_side=50, workers=workers)
    assert files(tmp_path / "one") == files(tmp_path / "other")
    with tarfile.open(tmp_path / "one" / "shard-000000.tar") as tar:
        assert {(one.mtime, one.uid, one.uname, one.mode, *one.pax_headers) for one in tar} == {
            (0, 0, "", 0o644)
        }


# -- names and labels -----------------------------------------------------------------------------

ODD = [
    "a.jpg", "a.png", "a_1.jpg", "b.v2.final.jpg", "v1.0/b.jpg", "/etc/c.jpg", "../../c.jpg", "x/../d.jpg",
    ".e.jpg", "tab\there.jpg", "line\nbreak.jpg", "späti.jpg", "l" * 200 + ".jpg", "no ending", "row.7",
    "not utf \udcff.jpg", "//",
]  # fmt: skip


def test_any_name_becomes_a_key_of_its_own_that_leads_nowhere(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    labels = np.arange(len(ODD)) % 2
    index = SampleIndex.from_source(Table([file.getvalue()] * len(ODD)), labels, ["ant", "bee"], names=ODD)
    pack(index, tmp_path / "packed")
    found = members(tmp_path / "packed")
    # WebDataset's rule: a key ends at the first dot after the last slash.
    parted = [re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", name) for name in found]
    keys = [match[1] for match in parted if match]
    assert [match and match[2] for match in parted] == ["png", "cls"] * len(ODD)
    assert keys[::2] == keys[1::2]
    assert len(set(keys)) == len(ODD)
    assert not any(name.startswith("/") or ".." in name or set(name) & set("\t\n\0") for name in found)
    assert keys[:10:2] == ["a", "a_1", "a_1_1", "b_v2_final", "v1.0/b"]
    assert from_shards(tmp_path / "packed").labels.tolist() == labels.tolist()


def test_many_equal_names_are_told_apart_in_linear_time():
    names = ["a.jpg"] * 50_000 + ["a_7.png", "a.jpg.jpg"]
    keys = shard_keys(names)
    assert len(set(keys)) == len(names)
    assert keys[:3] == ["a", "a_1", "a_2"]


@pytest.mark.parametrize(
    ("classes", "labels", "named"),
    [
        (["ant", "bee"], [0, 1, -1], True),
        (["ant", "bee"], [1, 1], False),
        (["bee", "ant"], [0, 1], False),
        (["10", "9"], [0, 1], False),
        (["20240101", "20240102"], [0, 1], False),
        (["1_2", "1_3"], [0, 1], True),
        (["ant", " bee"], [0, 1], False),
        (["", "bee"], [0, 1], False),
        (["ant", "b\udcffee"], [0, 1], False),
        (["0", "1"], [0, 1], True),
    ],
)
def test_a_label_is_a_name_if_that_reads_to_the_same_number(classes, labels, named):
    words = label_words(np.array(labels, np.int32), classes)
    written = [words[label].encode().decode().strip() if label >= 0 else None for label in labels]
    assert number_labels(written)[0] == labels
    assert (words == {label: classes[label] for label in labels if label >= 0}) == named


# -- smaller images -------------------------------------------------------------------------------


def ramp(height: int, width: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom, both from 16 to 240; blue is their mean."""
    y, x = np.mgrid[:height, :width]
    red, green = 16 + 224 * (x + 0.5) / width, 16 + 224 * (y + 0.5) / height
    return Image.fromarray(np.rint(np.stack([red, green, (red + green) / 2], axis=2)).astype(np.uint8))


def pixels_of(image: Image.Image) -> NDArray[np.float64]:
    """(H, W, 3) as stored; not for turned TIFF."""
    return np.asarray(image.convert("RGB"), np.float64)


def turn(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


FORMATS: dict[str, Callable[[Image.Image, Path], object]] = {
    "plain.jpg": lambda image, path: image.save(path, quality=95),
    "progressive.JPEG": lambda image, path: image.save(path, quality=95, progressive=True),
    "turned.jpg": lambda image, path: image.save(path, quality=95, exif=turn(6)),
    "cmyk.jpg": lambda image, path: image.convert("CMYK").save(path, quality=95),
    "plain.png": lambda image, path: image.save(path),
    "alpha.png": lambda image, path: image.convert("RGBA").save(path),
    "palette.png": lambda image, path: image.quantize(200).save(path),
    "lossy.webp": lambda image, path: image.save(path, quality=95),
    "plain.bmp": lambda image, path: image.save(path),
    "plain.ppm": lambda image, path: image.save(path),
    "plain.tif": lambda image, path: image.save(path),
    "turned.tif": lambda image, path: image.save(path, tiffinfo={274: 6}),
    "mirrored.tif": lambda image, path: image.save(path, tiffinfo={274: 5}),
}


@pytest.mark.parametrize(("height", "width"), [(75, 100), (133, 41), (321, 1003)])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_shrunk_without_a_shift(tmp_path, name, height, width):
    (tmp_path / "source").mkdir()
    FORMATS[name](ramp(height, width), tmp_path / "source" / name)
    assert pack(from_folder(tmp_path / "source"), tmp_path / "packed", short_side=40).left_out == {}
    scale = 40 / min(height, width)
    assert from_shards(tmp_path / "packed").sizes.tolist() == [[round(height * scale), round(width * scale)]]
    (image,) = opened(tmp_path / "packed").values()
    pixels = pixels_of(image)
    # A straight line through each ramp tells where the image's edges have come to lie, far finer than the
    # noise of single pixels. Three columns at the border are bent by the filter.
    for along, channel in ((1, 0), (0, 1)):
        line = pixels[..., channel].mean(axis=1 - along)
        side = len(line)
        place = (np.arange(side) + 0.5) / side
        slope, start = np.polyfit(place[3:-3], line[3:-3], 1)
        found = (np.array([16, 240]) - start) / slope
        assert np.abs(found - [0, 1]).max() * side < 0.3, (along, found)


def test_only_larger_images_are_encoded_anew_and_all_others_stay_byte_for_byte(source, tmp_path):
    pack(source, tmp_path / "packed", short_side=50, quality=70)
    shards = from_shards(tmp_path / "packed")
    large = source.sizes.min(axis=1) > 50
    assert 0 < large.sum() < len(source)
    assert [one == other for one, other in zip(encoded(shards), encoded(source), strict=True)] == list(~large)
    assert shards.sizes.min(axis=1).tolist() == source.sizes.min(axis=1).clip(max=50).tolist()
    assert shards.labels.tolist() == source.labels.tolist()


def test_what_is_small_enough_stays_whatever_it_is(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    ramp(20, 90).save(source / "comment.jpg", quality=60, comment=b"kept", exif=turn(3))
    ramp(32, 32).save(source / "bound.jpeg", progressive=True)
    ramp(20, 90).convert("CMYK").save(source / "cmyk.jpg")
    ramp(20, 90).save(source / "not what it says.jpg", "PNG")
    pack(from_folder(source), tmp_path / "packed", short_side=32)
    before = {file.stem: file.read_bytes() for file in source.iterdir()}
    found = members(tmp_path / "packed")
    assert {name.split(".")[0]: content for name, content in found.items()} == before
    assert "not what it says.png" in found


def test_grey_stays_grey_and_sixteen_bits_become_the_eight_that_the_loader_decodes(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    grey = np.asarray(ramp(128, 128).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(source / "deep.png")
    Image.fromarray(grey).save(source / "grey.png")
    Image.fromarray(grey).convert("LA").save(source / "alpha.png")
    pack(from_folder(source), tmp_path / "packed", short_side=64)
    images = opened(tmp_path / "packed")
    small = np.asarray(Image.fromarray(grey).resize((64, 64), Image.Resampling.BOX))
    assert list(images) == ["alpha.jpg", "deep.jpg", "grey.jpg"]
    for image in images.values():
        assert image.mode == "L"
        assert np.abs(np.asarray(image).astype(int) - small).max() <= 4


def test_of_the_metadata_of_shrunk_images_only_the_orientation_stays(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    exif = turn(6)
    exif[0x010E] = "a long description " * 50
    ramp(100, 80).save(source / "a.jpg", exif=exif, comment=b"comment", icc_profile=b"profile" * 100)
    ramp(100, 80).save(source / "b.tif", tiffinfo={274: 6})
    ramp(100, 80).save(source / "c.png", exif=turn(8))
    ramp(100, 80).save(source / "d.jpg", quality=95)
    pack(from_folder(source), tmp_path / "packed", short_side=32)
    images = opened(tmp_path / "packed")
    for name, orientation in (("a", 6), ("b", 6), ("c", 8), ("d", None)):
        image = images[f"{name}.jpg"]
        assert dict(image.getexif()) == ({} if orientation is None else {0x0112: orientation})
        assert not {"comment", "icc_profile"} & set(image.info)
        assert np.abs(pixels_of(image) - pixels_of(images["d.jpg"])).mean() < 2


def test_the_loader_makes_nearly_the_same_views_of_shrunk_images(photographs, tmp_path):
    everything = from_folder(photographs)
    index = everything.subset([0, len(everything) - 1])
    pack(index, tmp_path / "packed", short_side=256)
    views = []
    for one in (index, from_shards(tmp_path / "packed")):
        whole = recipes.localisation(128)
        (batch,) = ViewLoader(one, whole, 2, device="cpu", shuffle=False, rank=0, world=1)
        views.append(batch.views[0].numpy())
    assert views[0].std() > 0.5
    assert np.abs(views[0] - views[1]).mean() < 0.06


# -- interruptions --------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_between_any_two_touches_of_the_disk_it_continues_to_the_same_files(photos, tmp_path):
    copied = shutil.copytree(photos, tmp_path / "source")
    (copied / "bee" / "0003.png").write_bytes(damaged_png())
    source = from_folder(copied)
    whole = pack(source, tmp_path / "whole", 9, short_side=50)
    assert list(whole.left_out) == ["bee/0003.png"]
    call = "pack_shards(source, out, short_side=50, per_shard=9, workers=2, progress=False)"
    before = (
        "from dali_views import SampleIndex; from dali_views.tools.pack import pack_shards\n"
        f"source = SampleIndex.from_folder({str(copied)!r}, cache=False, progress=False)"
    )
    killed = killed_at_every_touch(before, call, tmp_path / "killed")
    assert len(killed) > 20
    counts = set()
    for folder in killed:
        finished = touched(folder)
        assert pack(source, folder, 9, short_side=50) == whole
        assert files(folder) == files(tmp_path / "whole")
        assert finished.items() <= touched(folder).items()
        counts.add(len(finished))
    assert counts == {0, 1, 2, 3}


def test_killed_by_another_process_the_command_continues_to_the_same_files(tmp_path):
    source = noise_images(tmp_path / "source", 36, sizes=(500, 600))
    pack(from_folder(source), tmp_path / "whole", 12, short_side=256)
    arguments = ["pack", str(source), str(tmp_path / "packed"), "--per-shard", "12", "--short-side", "256"]
    process = subprocess.Popen([sys.executable, "-m", "dali_views", *arguments, "--workers", "1"])
    first = tmp_path / "packed" / "shard-000000.tar"
    while not first.exists():
        with pytest.raises(subprocess.TimeoutExpired):  # it is still running
            process.wait(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = touched(tmp_path / "packed")
    assert "shard-000002.tar" not in finished
    assert main(arguments) == 0
    assert files(tmp_path / "packed") == files(tmp_path / "whole")
    assert finished.items() <= touched(tmp_path / "packed").items()


def test_what_is_finished_is_neither_read_nor_written_again(photos, tmp_path):
    index = of_table(photos, tmp_path)
    table: Any = index.source.whole  # type: ignore[union-attr]
    pack(index, tmp_path / "packed")
    before, first = touched(tmp_path / "packed"), files(tmp_path / "packed")
    (tmp_path / "packed" / "shard-000002.tar").unlink()
    table.asked.clear()
    assert pack(index, tmp_path / "packed").images == 24
    assert sorted(table.asked) == [10, 11, 12, 13, 14]
    after = touched(tmp_path / "packed")
    assert {name for name in before if before[name] != after[name]} == {"shard-000002.tar"}
    assert files(tmp_path / "packed") == first


# -- bad images, a source that goes, a full disk --------------------------------------------------


@contextmanager
def raising(table: Any, errors: dict[int, Exception]) -> Iterator[None]:
    table.errors = errors
    yield
    table.errors = {}


def test_what_cannot_be_used_is_left_out_with_its_reason_also_in_later_calls(photos, tmp_path):
    index = of_table(photos, tmp_path)
    table: Any = index.source.whole  # type: ignore[union-attr]
    table.images[3] = damaged_png()
    table.images[9] = table.images[12]
    table.images[13] = table.images[13][:200]
    with raising(table, {1: KeyError("lost\tits key"), 17: FileNotFoundError("x")}):
        packed = pack(index, tmp_path / "packed")
    words = {
        1: "lost", 3: "cannot be decoded|changed since", 9: "changed since", 13: "cut off|truncated",
        17: "no such file",
    }  # fmt: skip
    names = {f"https://host/{row:02d}": word for row, word in words.items()}
    assert packed.left_out.keys() == names.keys()
    for name, word in names.items():
        assert re.search(word, packed.left_out[name])
    good = [row for row in range(24) if row not in words]
    assert packed.images == len(good)
    assert encoded(from_shards(tmp_path / "packed")) == encoded(index.subset(good))
    assert from_shards(tmp_path / "packed").labels.tolist() == index.labels[good].tolist()
    whole = files(tmp_path / "packed")
    listed = bad_list.load(tmp_path / "packed" / "left_out.txt")
    assert listed.keys() == packed.left_out.keys()
    # The table gives all images now; what was left out of a finished shard stays on the list.
    (tmp_path / "packed" / "left_out.txt").unlink()
    (tmp_path / "packed" / "shard-000004.tar").unlink()
    assert pack(index, tmp_path / "packed") == packed
    assert files(tmp_path / "packed") == whole
    # A shard that is deleted is tried again.
    (tmp_path / "packed" / "shard-000003.tar").unlink()
    assert pack(index, tmp_path / "packed").left_out.keys() == names.keys() - {"https://host/17"}


def test_files_that_the_index_left_out_are_listed_but_not_those_that_are_listed_twice(photos, tmp_path):
    pictures = [file.read_bytes() for file in sorted(photos.rglob("*.jpg"))[:2]]
    twice = [("a.jpg", pictures[0]), ("b.jpg", pictures[1]), ("a.jpg", pictures[1]), ("c.jpg", b"no image")]
    index = SampleIndex.from_shards(write_shard(tmp_path / "twice.tar", twice), cache=False, progress=False)
    assert [path for path, _ in index.left_out] == ["twice.tar/a.jpg", "twice.tar/c.jpg"]
    assert pack(index, tmp_path / "packed").left_out.keys() == {"twice.tar/c.jpg"}
    assert encoded(index.without(tmp_path / "packed" / "left_out.txt")) == pictures


def test_a_shard_may_be_empty_but_not_all(photos, tmp_path):
    index = of_table(photos, tmp_path)
    table: Any = index.source.whole  # type: ignore[union-attr]
    with raising(table, dict.fromkeys(range(5), OSError("lost"))):
        assert pack(index, tmp_path / "packed").shards == 5
    assert encoded(from_shards(tmp_path / "packed")) == encoded(index)[5:]
    with (
        raising(table, dict.fromkeys(range(24), OSError("lost"))),
        pytest.raises(ValueError, match=r"None of the 24 images could be packed .*lost"),
    ):
        pack(index, tmp_path / "none")


def test_a_class_without_a_usable_image_is_reported_and_can_be_fixed(photos, tmp_path):
    copied = shutil.copytree(photos, tmp_path / "source")
    source = from_folder(copied)
    for file in (copied / "ant").iterdir():
        file.write_bytes(b"no image any more")
    with pytest.warns(UserWarning, match=r"\['ant'\] is usable"):
        pack(source, tmp_path / "packed")
    pack(source.without(tmp_path / "packed" / "left_out.txt"), tmp_path / "anew")
    assert from_shards(tmp_path / "anew").labels.tolist() == [1] * 8 + [2] * 8


@pytest.mark.parametrize("error", [SourceGoneError("unplugged"), ConnectionResetError("unplugged")])
def test_a_source_that_is_gone_ends_the_call_and_the_next_one_continues(photos, tmp_path, error):
    index = of_table(photos, tmp_path)
    table: Any = index.source.whole  # type: ignore[union-attr]
    pack(index, tmp_path / "whole")
    with (
        raising(table, {12: error}),
        pytest.raises(SourceGoneError, match=r"is gone \(unplugged\); bring it back"),
    ):
        pack(index, tmp_path / "packed")
    assert files(tmp_path / "packed").keys() == {"pack.json", "shard-000000.tar", "shard-000001.tar"}
    assert pack(index, tmp_path / "packed").left_out == {}
    assert files(tmp_path / "packed") == files(tmp_path / "whole")


def test_a_folder_that_is_gone_costs_no_image(photos, tmp_path):
    source = from_folder(shutil.copytree(photos, tmp_path / "source"))
    (tmp_path / "source").rename(tmp_path / "unplugged")
    with pytest.raises(SourceGoneError, match="bring it back"):
        pack(source, tmp_path / "packed")
    (tmp_path / "unplugged").rename(tmp_path / "source")
    assert pack(source, tmp_path / "packed").left_out == {}


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(source, tmp_path):
    # A limit on the size of files fails a write as a full disk does, and needs no disk of its own.
    pack(source, tmp_path / "whole", 20)
    sizes = [shard.stat().st_size for shard in sorted((tmp_path / "whole").glob("*.tar"))]
    assert sizes[1] < sizes[0]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0] - 1, before[1]))
        with pytest.raises(OSError, match=r"shard-000000\.tar' cannot be written .*free some") as raised:
            pack(source, tmp_path / "packed", 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(raised.value)
    assert files(tmp_path / "packed").keys() == {"pack.json"}
    pack(source, tmp_path / "packed", 20)
    assert files(tmp_path / "packed") == files(tmp_path / "whole")


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"per_shard": 6}, "per_shard 5"),
        ({"short_side": 51}, "short_side 50"),
        ({"quality": 91}, "quality 90"),
        ({"numbers": True}, "labels"),
        ({"source": slice(1, None)}, "source"),
    ],
)
def test_shards_begun_with_other_settings_are_refused_and_left_alone(source, tmp_path, options, word):
    pack(source, tmp_path / "packed", short_side=50)
    before, rows = files(tmp_path / "packed"), np.arange(len(source))
    changed = source.subset(rows[options.pop("source", slice(None))])
    with pytest.raises(ValueError, match=f"was packed with .*{word}"):
        pack(changed, tmp_path / "packed", **{"short_side": 50, **options})
    assert files(tmp_path / "packed") == before


def test_a_folder_with_other_things_in_the_source_or_in_a_store_is_refused(
    source, photos, tmp_path, monkeypatch
):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    for place, word in (
        (tmp_path / "other", "holds other things"),
        (photos / "packed", "in its source"),
        (tmp_path / "link" / "packed", "in its source"),
        (Path("s3://bucket/copy"), "not to s3://bucket/copy; name one"),
    ):
        with pytest.raises(ValueError, match=word):
            pack(source, place)
    (tmp_path / "other" / "thesis.tex").rename(tmp_path / "other" / "pack.json")
    with pytest.raises(ValueError, match=r"pack\.json' is damaged"):
        pack(source, tmp_path / "other")
    assert files(tmp_path / "other") == {"pack.json": b"precious"}
    assert {path.name for path in photos.iterdir()} == set(KINDS)
    assert {path.name for path in tmp_path.iterdir()} == {"other", "link"}


@pytest.mark.parametrize("options", [{"short_side": 0}, {"quality": 101}, {"per_shard": 0}])
def test_options_out_of_range_are_refused_before_anything_is_made(source, tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        pack(source, tmp_path / "packed", **options)
    assert not (tmp_path / "packed").exists()


# -- the command ----------------------------------------------------------------------------------


def test_the_command_packs_a_folder_and_shards_of_shards(photos, tmp_path, capsys):
    packed = tmp_path / "packed"
    assert main(["pack", str(photos), str(packed), "--per-shard", "10"]) == 0
    assert "24 images in 3 shards; 0 left out" in capsys.readouterr().out
    shards = [str(shard) for shard in sorted(packed.glob("*.tar"))]
    assert main(["pack", *shards, str(tmp_path / "again")]) == 0
    assert members(tmp_path / "again") == members(packed)
    assert main(["pack", *shards, str(tmp_path / "numbers"), "--numbers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"shards": 1, "images": 24, "left_out": {}}
    assert set(members(tmp_path / "numbers").values()) > {b"0", b"1", b"2"}
    assert from_shards(tmp_path / "numbers").labels.tolist() == from_shards(packed).labels.tolist()
