"""Packing: the shards are the same data set, whatever it came from and whatever happened on the way."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import noise_images
from PIL import Image
from tars import pack_folder
from test_source import Table
from touches import killed_at_every_touch

from dali_views import SampleIndex, SourceGoneError, bad_list
from dali_views.tools.cli import main
from dali_views.tools.pack import Packed, pack_shards
from dali_views.tools.scenes import make_scenes

KINDS = ("ant", "bee", "cow")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight images each; the last of a class is a PNG."""
    folder = tmp_path_factory.mktemp("photos")
    for seed, kind in enumerate(KINDS):
        last = noise_images(folder / kind, 8, seed=seed) / "0007.jpg"
        Image.open(last).save(last.with_suffix(".png"))
        last.unlink()
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
    found: dict[str, Any] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return found


def opened(folder: Path) -> list[Image.Image]:
    return [Image.open(io.BytesIO(data)) for name, data in members(folder).items() if name[-4:] != ".cls"]


def files(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def touched(root: Path) -> dict[str, tuple[int, int]]:
    """Which file each shard is, and when it was written."""
    return {shard.name: (shard.stat().st_ino, shard.stat().st_mtime_ns) for shard in root.glob("*.tar")}


# -- the same data set ----------------------------------------------------------------------------


def of_list(photos: Path, folder: Path) -> SampleIndex:
    names = [f"{kind}/000{n}.jpg" for n in (4, 0, 6) for kind in ("cow", "ant", "bee")]
    lines = [f"{name}\t{n % 4 - 1}\n" for n, name in enumerate(names)]
    (folder / "list.txt").write_text("".join(lines))
    return SampleIndex.from_list(folder / "list.txt", photos, cache=False, progress=False)


def of_table(photos: Path, _: Path, classes: Sequence[str] = KINDS) -> SampleIndex:
    images = [file.read_bytes() for file in sorted(photos.rglob("*.*g"))]
    labels, names = np.arange(len(images)) % 3, [f"https://host/{n:02d}" for n in range(len(images))]
    return SampleIndex.from_source(Table(images, arrays=True), labels, classes, names=names, progress=False)


@pytest.fixture
def table(photos: Path, tmp_path: Path) -> tuple[SampleIndex, Table]:
    index = of_table(photos, tmp_path)
    return index, index.source.whole  # type: ignore[union-attr,return-value]


SOURCES: dict[str, Callable[[Path, Path], SampleIndex]] = {
    "folder": lambda photos, _: from_folder(photos),
    "reordered": lambda photos, _: from_folder(photos, classes=["cow", "bee", "ant"]),
    "part": lambda photos, _: from_folder(photos).subset([20, 3, 3, 9, 3]),
    "list": of_list,
    "shards": lambda photos, folder: from_shards(Path(pack_folder(photos, folder / "others", 3)).parent),
    "table": of_table,
    "classes like numbers": lambda photos, folder: of_table(photos, folder, ("10", "9", "")),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_shards_of_any_index_hold_its_images_labels_and_order(photos, tmp_path, kind):
    index = SOURCES[kind](photos, tmp_path)
    packed = pack(index, tmp_path / "packed")
    again = from_shards(tmp_path / "packed")
    assert encoded(again) == encoded(index)
    assert again.labels.tolist() == index.labels.tolist()
    assert np.array_equal(again.sizes, index.sizes)
    assert packed == Packed(-(-len(index) // 5), len(index), {})
    if kind in ("folder", "shards", "table"):
        assert again.classes == index.classes


def test_pixels_become_png_without_a_loss(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (23, 9, 11, 3), dtype=np.uint8)
    index = SampleIndex.from_arrays(pixels, np.arange(23) % 4)
    pack(index, tmp_path / "packed")
    again = from_shards(tmp_path / "packed")
    assert np.array_equal([np.asarray(image) for image in opened(tmp_path / "packed")], pixels)
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


ODD = [
    "a.jpg", "a.png", "a_1.jpg", "b.v2.final.jpg", "v1.0/b.jpg", "/etc/c.jpg", "../../c.jpg", ".e.jpg",
    "line\nbreak.jpg", "späti.jpg", "l" * 200 + ".jpg", "no ending", "not utf \udcff.jpg", "//",
]  # fmt: skip


def test_any_name_becomes_a_key_of_its_own_that_leads_nowhere(photos, tmp_path):
    image = (photos / "ant" / "0007.png").read_bytes()
    pack(SampleIndex.from_source(Table([image] * len(ODD)), [0] * len(ODD), names=ODD), tmp_path / "packed")
    # WebDataset's rule: a key ends at the first dot after the last slash.
    parted = [re.fullmatch(r"((?:.*/)?[^./]+)\.(png|cls)", name) for name in members(tmp_path / "packed")]
    keys = [match[1] for match in parted if match]
    assert len(parted) == len(keys) == 2 * len(ODD)
    assert keys[::2] == keys[1::2]
    assert len(set(keys)) == len(ODD)
    assert not any(key.startswith("/") or ".." in key or "\n" in key for key in keys)
    assert keys[:10:2] == ["a", "a_1", "a_1_1", "b_v2_final", "v1.0/b"]


def ramp(height: int, width: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom, both from 16 to 240; blue is their mean."""
    y, x = np.mgrid[:height, :width]
    red, green = 16 + 224 * (x + 0.5) / width, 16 + 224 * (y + 0.5) / height
    return Image.fromarray(np.rint(np.stack([red, green, (red + green) / 2], axis=2)).astype(np.uint8))


def made(folder: Path, images: dict[str, tuple[Image.Image, dict[str, Any]]]) -> SampleIndex:
    """An index of images that are saved under these names with these options."""
    folder.mkdir()
    for name, (image, options) in images.items():
        image.save(folder / name, **options)
    return from_folder(folder)


def turn(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "progressive.JPEG": ("RGB", {"quality": 95, "progressive": True}),
    "cmyk.jpg": ("CMYK", {"quality": 95}),
    "alpha.png": ("RGBA", {}),
    "lossy.webp": ("RGB", {"quality": 95}),
    "plain.bmp": ("RGB", {}),
    "plain.ppm": ("RGB", {}),
    "mirrored.tif": ("RGB", {"tiffinfo": {274: 5}}),
}


@pytest.mark.parametrize(("height", "width"), [(133, 41), (321, 1003)])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_shrunk_without_a_shift(tmp_path, name, height, width):
    mode, options = FORMATS[name]
    index = made(tmp_path / "source", {name: (ramp(height, width).convert(mode), options)})
    assert pack(index, tmp_path / "packed", short_side=40).left_out == {}
    scale = 40 / min(height, width)
    assert from_shards(tmp_path / "packed").sizes.tolist() == [[round(height * scale), round(width * scale)]]
    (image,) = opened(tmp_path / "packed")
    pixels = np.asarray(image.convert("RGB"), np.float64)
    # A straight line through each ramp tells where the image's edges have come to lie, far finer than the
    # noise of single pixels. Three columns at the border are bent by the filter.
    for along, channel in ((1, 0), (0, 1)):
        line = pixels[..., channel].mean(axis=1 - along)
        side = len(line)
        place = (np.arange(side) + 0.5) / side
        slope, start = np.polyfit(place[3:-3], line[3:-3], 1)
        found = (np.array([16, 240]) - start) / slope
        assert np.abs(found - [0, 1]).max() * side < 0.3, (along, found)


def test_what_is_small_enough_stays_whatever_it_is(tmp_path):
    images = {
        "comment.jpg": (ramp(20, 90), {"quality": 60, "comment": b"kept", "exif": turn(3)}),
        "bound.jpeg": (ramp(32, 32), {"progressive": True}),
        "cmyk.jpg": (ramp(20, 90).convert("CMYK"), {}),
        "not what it says.jpg": (ramp(20, 90), {"format": "PNG"}),
    }
    pack(made(tmp_path / "source", images), tmp_path / "packed", short_side=32)
    before = {file.stem: file.read_bytes() for file in (tmp_path / "source").iterdir()}
    found = members(tmp_path / "packed")
    assert {name.split(".")[0]: content for name, content in found.items()} == before
    assert "not what it says.png" in found


def test_grey_stays_grey_and_sixteen_bits_become_the_eight_that_the_loader_decodes(tmp_path):
    grey = np.asarray(ramp(128, 128).convert("L"))
    deep, alpha = Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey).convert("LA")
    pack(
        made(tmp_path / "source", {"a.png": (alpha, {}), "d.png": (deep, {})}),
        tmp_path / "packed",
        short_side=64,
    )
    small = np.asarray(Image.fromarray(grey).resize((64, 64), Image.Resampling.BOX))
    for image in opened(tmp_path / "packed"):
        assert image.mode == "L"
        assert np.abs(np.asarray(image).astype(int) - small).max() <= 4


def test_of_the_metadata_of_shrunk_images_only_the_orientation_stays(tmp_path):
    more = {"comment": b"comment", "icc_profile": b"profile" * 100}
    source = {
        "a.jpg": (ramp(100, 80), {"exif": turn(6), **more}),
        "b.tif": (ramp(100, 80), {"tiffinfo": {274: 6}}),
        "c.png": (ramp(100, 80), {"exif": turn(8)}),
    }
    pack(made(tmp_path / "source", source), tmp_path / "packed", short_side=32)
    for image, orientation in zip(opened(tmp_path / "packed"), (6, 6, 8), strict=True):
        assert dict(image.getexif()) == {0x0112: orientation}
        assert not more.keys() & image.info.keys()


@pytest.mark.slow
def test_killed_between_any_two_touches_of_the_disk_it_continues_to_the_same_files(photos, source, tmp_path):
    whole = pack(source, tmp_path / "whole", 9, short_side=50)
    before = (
        "from dali_views import SampleIndex; from dali_views.tools.pack import pack_shards\n"
        f"source = SampleIndex.from_folder({str(photos)!r}, cache=False, progress=False)"
    )
    call = "pack_shards(source, out, short_side=50, per_shard=9, workers=2, progress=False)"
    counts = set()
    for folder in killed_at_every_touch(before, call, tmp_path / "killed"):
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


# -- bad images, a source that goes, a full disk --------------------------------------------------


def test_what_cannot_be_used_is_left_out_with_its_reason_also_in_later_calls(table, tmp_path):
    (index, table), packed = table, tmp_path / "packed"
    images = table.images
    images[7] = images[7].copy()
    images[7][-2000:-1000] = 0  # pixels of a PNG
    images[9] = images[12]
    images[13] = images[13][:200]
    table.errors = {1: KeyError("lost\tits key"), 17: FileNotFoundError("x")}
    first = pack(index, packed)
    words = {1: "lost", 7: "cannot be decoded", 9: "changed since", 13: "truncated", 17: "no such file"}
    names = {f"https://host/{row:02d}": word for row, word in words.items()}
    assert first.left_out.keys() == names.keys() == bad_list.load(packed / "left_out.txt").keys()
    assert [name for name, word in names.items() if word not in first.left_out[name]] == [], first.left_out
    good = index.subset([row for row in range(24) if row not in words])
    assert encoded(from_shards(packed)) == encoded(good)
    assert from_shards(packed).labels.tolist() == good.labels.tolist()
    # The table gives all images now. What was left out of a finished shard, which is not read, stays so.
    whole, written = files(packed), touched(packed)
    table.errors = {}
    table.asked.clear()
    (packed / "left_out.txt").unlink()
    (packed / "shard-000004.tar").unlink()
    assert pack(index, packed) == first
    assert files(packed) == whole
    assert sorted(table.asked) == [20, 21, 22, 23]
    assert len(written.items() & touched(packed).items()) == 4
    # A shard that is deleted is tried again.
    (packed / "shard-000003.tar").unlink()
    assert pack(index, packed).left_out.keys() == names.keys() - {"https://host/17"}
    table.errors = dict.fromkeys(range(24), OSError("lost"))
    with pytest.raises(ValueError, match=r"None of the 24 images could be packed .*lost"):
        pack(index, tmp_path / "none")


def test_a_class_without_a_usable_image_is_reported_and_can_be_fixed(photos, tmp_path):
    copied = shutil.copytree(photos, tmp_path / "source")
    (copied / "cow" / "bad.jpg").write_bytes(b"no image from the start")
    source = from_folder(copied)
    for file in (copied / "ant").iterdir():
        file.write_bytes(b"no image any more")
    with pytest.warns(UserWarning, match=r"\['ant'\] is usable"):
        packed = pack(source, tmp_path / "packed")
    assert "cow/bad.jpg" in packed.left_out
    pack(source.without(tmp_path / "packed" / "left_out.txt"), tmp_path / "anew")
    assert from_shards(tmp_path / "anew").labels.tolist() == [1] * 8 + [2] * 8


def test_a_source_that_is_gone_ends_the_call_and_the_next_one_continues(table, tmp_path):
    index, table = table
    pack(index, tmp_path / "whole")
    table.errors = {12: ConnectionResetError("unplugged")}
    with pytest.raises(SourceGoneError, match=r"is gone \(unplugged\); restore it"):
        pack(index, tmp_path / "packed")
    table.errors = {}
    assert files(tmp_path / "packed").keys() == {"pack.json", "shard-000000.tar", "shard-000001.tar"}
    pack(index, tmp_path / "packed")
    assert files(tmp_path / "packed") == files(tmp_path / "whole")


def test_a_folder_that_is_gone_costs_no_image(photos, tmp_path):
    source = from_folder(shutil.copytree(photos, tmp_path / "source"))
    shutil.rmtree(tmp_path / "source")
    with pytest.raises(SourceGoneError, match="restore it"):
        pack(source, tmp_path / "packed")
    assert list(files(tmp_path / "packed")) == ["pack.json"]


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(source, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"^.*shard-000000\.tar' cannot be written .*free some.*$"):
            pack(source, tmp_path / "packed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(tmp_path / "packed").keys() == {"pack.json"}
    assert pack(source, tmp_path / "packed").images == 24


def test_shards_begun_with_other_settings_are_refused_and_left_alone(source, tmp_path):
    pack(source, tmp_path / "packed", short_side=50)
    before = files(tmp_path / "packed")
    for name, word in (("per_shard", "per_shard 5"), ("short_side", "short_side 50"), ("numbers", "labels")):
        with pytest.raises(ValueError, match=f"was packed with {word}"):
            pack(source, tmp_path / "packed", **{"short_side": 50, name: 7})
    with pytest.raises(ValueError, match="was packed with source"):
        pack(source.subset([1, 2]), tmp_path / "packed", short_side=50)
    assert files(tmp_path / "packed") == before


def test_a_folder_with_other_things_in_the_source_or_in_a_store_is_refused(source, photos, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    (tmp_path / "link").symlink_to(photos)
    for place, word in (("other", "holds other things"), ("link/packed", "in its source")):
        with pytest.raises(ValueError, match=word):
            pack(source, tmp_path / place)
    with pytest.raises(ValueError, match="not to s3://bucket/copy; name one"):
        pack(source, Path("s3://bucket/copy"))
    (tmp_path / "other" / "thesis.tex").rename(tmp_path / "other" / "pack.json")
    with pytest.raises(ValueError, match=r"pack\.json' is damaged"):
        pack(source, tmp_path / "other")
    assert files(tmp_path / "other") == {"pack.json": b"precious"}


def test_the_command_packs_a_folder_and_shards_of_shards(photos, tmp_path, capsys):
    packed = tmp_path / "packed"
    assert main(["pack", str(photos), str(packed), "--per-shard", "10"]) == 0
    assert "24 images in 3 shards; 0 left out" in capsys.readouterr().out
    assert main(["pack", str(packed / "*.tar"), str(tmp_path / "again")]) == 0
    assert members(tmp_path / "again") == members(packed)
    assert main(["pack", str(packed / "*.tar"), str(tmp_path / "numbers"), "--numbers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"shards": 1, "images": 24, "left_out": {}}
    assert set(members(tmp_path / "numbers").values()) > {b"0", b"1", b"2"}
    assert from_shards(tmp_path / "numbers").labels.tolist() == from_shards(packed).labels.tolist()
