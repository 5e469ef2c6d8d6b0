"""Packing to shards: the same data set, byte for byte, whatever it came from and happened on the way."""

from __future__ import annotations

import fcntl
import io
import itertools
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import noise_images
from PIL import Image
from tars import pack_folder, write_shard
from test_loader import FULL, digest
from test_source import Table
from touches import killed_at_every_touch

from dali_views import SampleIndex, SourceGoneError, ViewLoader, bad_list, recipes
from dali_views.data.listing import number_labels
from dali_views.tools.cli import main
from dali_views.tools.pack.folder import Packed, pack
from dali_views.tools.pack.lists import label_words, shard_keys
from dali_views.tools.pack.read import in_order
from dali_views.tools.pack.shards import pack_shards

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


def pack_to(folder: Path, source: SampleIndex, per_shard: int = 5, **options: Any) -> Packed:
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


def files(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def touched(root: Path) -> dict[str, tuple[int, int]]:
    """Which file it is and when it was written, by name of shard."""
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


def _of_list(photos: Path, folder: Path) -> SampleIndex:
    names = [f"{kind}/000{n}.jpg" for n in (4, 0, 6) for kind in ("cow", "ant", "bee")]
    lines = [f"{name}\t{n % 4 - 1}\n" for n, name in enumerate(names)]
    (folder / "list.txt").write_text("".join(lines))
    return SampleIndex.from_list(folder / "list.txt", photos, cache=False, progress=False)


def _of_shards(photos: Path, folder: Path) -> SampleIndex:
    pattern = pack_folder(photos, folder / "others", 3)
    return SampleIndex.from_shards(pattern, cache=False, progress=False)


def _of_table(photos: Path, folder: Path) -> SampleIndex:
    images = [file.read_bytes() for file in sorted(photos.rglob("*.*g"))]
    labels, names = np.arange(len(images)) % 3, [f"https://host/{n:02d}" for n in range(len(images))]
    return SampleIndex.from_source(Table(images, arrays=True), labels, KINDS, names=names, progress=False)


SOURCES: dict[str, Callable[[Path, Path], SampleIndex]] = {
    "folder": lambda photos, _: from_folder(photos),
    "reordered": lambda photos, _: from_folder(photos, classes=["cow", "bee", "ant"]),
    "unlabelled": lambda photos, _: from_folder(photos / "bee"),
    "part": lambda photos, _: from_folder(photos).subset([20, 3, 3, 9, 3]),
    "list": _of_list,
    "shards": _of_shards,
    "table": _of_table,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_shards_of_any_index_hold_its_images_labels_and_order(photos, tmp_path, kind):
    index = SOURCES[kind](photos, tmp_path)
    packed = pack_to(tmp_path / "packed", index)
    again = from_shards(tmp_path / "packed")
    assert encoded(again) == encoded(index)
    assert again.labels.tolist() == index.labels.tolist()
    assert np.array_equal(again.sizes, index.sizes)
    assert again.left_out == []
    assert len(list((tmp_path / "packed").glob("*.tar"))) == packed.shards == -(-len(index) // 5)
    assert (packed.written, packed.copied, packed.kept, packed.left_out) == (0, len(index), 0, {})
    assert packed.bytes_before == packed.bytes_after == sum(map(len, encoded(index)))
    if kind in ("folder", "shards", "table"):
        assert again.classes == index.classes


def test_the_shards_give_the_batches_of_their_source(source, tmp_path):
    pack_to(tmp_path / "packed", source)
    batches = []
    for index in (source, from_shards(tmp_path / "packed")):
        loader = ViewLoader(index, [FULL, FULL], 8, device="cpu", seed=3, rank=0, world=1)
        batches.append([digest(batch) for batch in loader])
    assert len(batches[0]) == 3
    assert batches[0] == batches[1]


def test_a_source_may_return_arrays_with_gaps_between_their_bytes(source, tmp_path):
    class Gaps(Table):
        def read(self, rows: np.ndarray) -> list[bytes | np.ndarray]:
            return [np.repeat(np.frombuffer(one, np.uint8), 2)[::2] for one in super().read(rows)]

    index = SampleIndex.from_source(Gaps(encoded(source)), sizes=source.sizes, progress=False)
    pack_to(tmp_path / "packed", index)
    assert encoded(from_shards(tmp_path / "packed")) == encoded(source)


def test_pixels_become_png_without_a_loss(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (23, 9, 11, 3), dtype=np.uint8)
    index = SampleIndex.from_arrays(pixels, np.arange(23) % 4)
    assert pack_to(tmp_path / "packed", index).written == 23
    again = from_shards(tmp_path / "packed")
    assert np.array_equal([np.asarray(Image.open(io.BytesIO(one))) for one in encoded(again)], pixels)
    assert (again.labels.tolist(), again.classes) == (index.labels.tolist(), index.classes)
    assert list(members(tmp_path / "packed"))[:3] == ["00.png", "00.cls", "01.png"]


def test_larger_images_are_shrunk_as_in_a_folder_and_others_stay_as_they_are(source, tmp_path):
    packed = pack_to(tmp_path / "packed", source, short_side=50, quality=70)
    pack(source, tmp_path / "copy", short_side=50, quality=70, progress=False)
    copy = SampleIndex.from_list(tmp_path / "copy" / "list.txt", cache=False, progress=False)
    shards = from_shards(tmp_path / "packed")
    large = source.sizes.min(axis=1) > 50
    assert 0 < packed.written == large.sum() < len(source)
    for row in range(len(source)):
        expected = copy if large[row] else source
        assert shards.encoded(row) == expected.encoded(row)
    assert shards.labels.tolist() == source.labels.tolist()
    assert packed.bytes_after == sum(map(len, encoded(shards)))


def test_the_loader_makes_nearly_the_same_views_of_shrunk_images(photographs, tmp_path):
    everything = from_folder(photographs)
    index = everything.subset([0, len(everything) - 1])
    pack_to(tmp_path / "packed", index, short_side=256)
    views = []
    for one in (index, from_shards(tmp_path / "packed")):
        whole = recipes.localisation(128)
        (batch,) = ViewLoader(one, whole, 2, device="cpu", shuffle=False, rank=0, world=1)
        views.append(batch.views[0].numpy())
    assert views[0].std() > 0.5
    assert np.abs(views[0] - views[1]).mean() < 0.06


# -- names and labels -----------------------------------------------------------------------------

ODD = [
    "a.jpg", "a.png", "a_png.jpg", "b.v2.final.jpg", "v1.0/b.jpg", "/etc/c.jpg", "../../c.jpg", "x/../d.jpg",
    ".e.jpg", "tab\there.jpg", "line\nbreak.jpg", "späti.jpg", "l" * 200 + ".jpg", "no ending", "row.7",
    "not utf \udcff.jpg", "//",
]  # fmt: skip


def test_any_name_becomes_a_key_of_its_own_that_leads_nowhere(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    labels = np.arange(len(ODD)) % 2
    index = SampleIndex.from_source(Table([file.getvalue()] * len(ODD)), labels, ["ant", "bee"], names=ODD)
    pack_to(tmp_path / "packed", index)
    found = members(tmp_path / "packed")
    # WebDataset's rule: a key ends at the first dot after the last slash.
    parted = [re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", name) for name in found]
    keys = [match[1] for match in parted if match]
    assert [match and match[2] for match in parted] == ["png", "cls"] * len(ODD)
    assert keys[::2] == keys[1::2]
    assert len(set(keys)) == len(ODD)
    assert not any(name.startswith("/") or ".." in name or set(name) & set("\t\n\0") for name in found)
    assert keys[:10:2] == ["a", "a_png", "a_png_jpg", "b_v2_final", "v1.0/b"]
    assert from_shards(tmp_path / "packed").labels.tolist() == labels.tolist()


def test_a_million_equal_names_are_told_apart_in_linear_time():
    names = ["a.jpg"] * 50_000 + ["a_jpg_7.png", "a.b.jpg"]
    keys = shard_keys(names)
    assert len(set(keys)) == len(names)
    assert keys[:3] == ["a", "a_jpg", "a_jpg_1"]


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
        (["ant", "b\tee"], [0, 1], False),
        (["ant", "b\udcffee"], [0, 1], False),
        (["0", "1"], [0, 1], True),
    ],
)
def test_a_label_is_a_name_where_that_reads_to_the_same_number(classes, labels, named):
    words = label_words(np.array(labels, np.int32), classes)
    written = [words[label].encode().decode().strip() if label >= 0 else None for label in labels]
    assert number_labels(written)[0] == labels
    assert (words == {label: classes[label] for label in labels if label >= 0}) == named


def test_labels_are_numbers_where_that_is_asked_for(source, tmp_path):
    pack_to(tmp_path / "packed", source, numbers=True)
    assert from_shards(tmp_path / "packed").labels.tolist() == source.labels.tolist()
    words = [content for name, content in members(tmp_path / "packed").items() if name.endswith(".cls")]
    assert words == [str(label).encode() for label in source.labels]


def test_headers_tell_nothing_of_when_and_by_whom_and_are_plain_where_names_are(source, tmp_path):
    pack_to(tmp_path / "packed", source)
    content = (tmp_path / "packed" / "shard-000000.tar").read_bytes()
    assert content[257:265] == b"ustar\x0000"
    assert b"PaxHeader" not in content
    with tarfile.open(tmp_path / "packed" / "shard-000000.tar") as tar:
        told = {(one.mtime, one.uid, one.gid, one.uname, one.gname, one.mode) for one in tar}
    assert told == {(0, 0, 0, "", "", 0o644)}


def test_equal_images_give_equal_files_however_many_threads_there_are(photos, source, tmp_path):
    copied = shutil.copytree(photos, tmp_path / "elsewhere")
    for file in copied.rglob("*.*g"):
        os.utime(file, (1, 1))
    for name, index, workers in (("one", source, 1), ("other", from_folder(copied), 5)):
        pack_to(tmp_path / name, index, short_side=50, workers=workers)
    assert files(tmp_path / "one") == files(tmp_path / "other")


def test_no_more_results_wait_than_may():
    drawn = itertools.count()
    with (
        ThreadPoolExecutor(3) as threads,
        closing(in_order(threads, lambda task: task, (next(drawn) for _ in range(100)), 4)) as results,
    ):
        for number in range(50):
            assert next(results) == number
        assert next(drawn) <= 50 + 4


# -- interruptions --------------------------------------------------------------------------------


def test_killed_between_any_two_touches_of_the_disk_it_goes_on_to_the_same_files(photos, tmp_path):
    copied = shutil.copytree(photos, tmp_path / "source")
    (copied / "bee" / "0003.png").write_bytes(damaged_png())
    source = from_folder(copied)
    whole = pack_to(tmp_path / "whole", source, 9, short_side=50)
    assert list(whole.left_out) == ["bee/0003.png"]
    call = "pack_shards(source, out, short_side=50, per_shard=9, workers=2, progress=False)"
    killed = killed_at_every_touch(call, copied, tmp_path / "killed")
    assert len(killed) > 30
    kept = []
    for folder in killed[::3] + killed[-3:]:
        finished = touched(folder)
        packed = pack_to(folder, source, 9, short_side=50)
        assert files(folder) == files(tmp_path / "whole")
        assert finished.items() <= touched(folder).items()
        assert packed.left_out == whole.left_out
        assert packed.kept + packed.written + packed.copied == 24
        assert (packed.bytes_before, packed.bytes_after) == (whole.bytes_before, whole.bytes_after)
        kept.append(packed.kept)
    assert kept[0] == 0
    assert set(kept) == {0, 9, 17, 24}


def test_killed_by_another_process_the_command_goes_on_to_the_same_files(tmp_path, capsys):
    source = noise_images(tmp_path / "source", 36, sizes=(500, 600))
    pack_to(tmp_path / "whole", from_folder(source), 12, short_side=256)
    arguments = ["pack", str(source), str(tmp_path / "packed"), "--per-shard", "12", "--short-side", "256"]
    process = subprocess.Popen([sys.executable, "-m", "dali_views", *arguments, "--workers", "1"])
    draft = tmp_path / "packed" / ".shard-000001.tar.tmp"
    while not draft.exists() or not draft.stat().st_size:
        with pytest.raises(subprocess.TimeoutExpired):  # it is still running
            process.wait(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [shard.name for shard in (tmp_path / "packed").glob("*.tar")] == ["shard-000000.tar"]
    assert main(arguments) == 0
    assert files(tmp_path / "packed") == files(tmp_path / "whole")
    assert "24 re-encoded, 0 copied as they are, 12 finished before" in capsys.readouterr().out


def test_what_is_finished_is_neither_read_nor_written_again(photos, tmp_path):
    index = _of_table(photos, tmp_path)
    table: Any = index.source.whole  # type: ignore[union-attr]
    pack_to(tmp_path / "packed", index)
    before, first = touched(tmp_path / "packed"), files(tmp_path / "packed")
    (tmp_path / "packed" / "shard-000002.tar").unlink()
    table.asked.clear()
    assert pack_to(tmp_path / "packed", index).kept == 19
    assert sorted(table.asked) == [10, 11, 12, 13, 14]
    after = touched(tmp_path / "packed")
    assert {name for name in before if before[name] != after[name]} == {"shard-000002.tar"}
    assert files(tmp_path / "packed") == first


def _cut(content: bytearray) -> None:
    del content[-700:]


def _lengthened(content: bytearray) -> None:
    content += bytes(512)


def _flipped_at(place: float) -> Callable[[bytearray], None]:
    """Of a shard, a bit of the first header (0.0), of an image (0.3), of the padding at the end (1.0)."""

    def harm(content: bytearray) -> None:
        content[round(place * (len(content) - 1))] ^= 1

    return harm


def _emptied(content: bytearray) -> None:
    content.clear()


def _flipped_before_a_header(content: bytearray) -> None:
    """Of a shard, in the padding of its first image; of a record, somewhere."""
    content[content.find(b"ustar", 600) - 258] ^= 1


@pytest.mark.parametrize(
    "harm",
    [
        _cut,
        _lengthened,
        _emptied,
        _flipped_before_a_header,
        _flipped_at(0.0),
        _flipped_at(0.3),
        _flipped_at(1.0),
    ],
)
@pytest.mark.parametrize("what", ["shard-000001.tar", "records/shard-000001.json"])
def test_a_damaged_shard_of_an_earlier_run_is_found_and_written_anew(source, tmp_path, harm, what):
    pack_to(tmp_path / "packed", source)
    before, whole = touched(tmp_path / "packed"), files(tmp_path / "packed")
    content = bytearray(whole[what])
    harm(content)
    (tmp_path / "packed" / what).write_bytes(content)
    with pytest.warns(UserWarning, match=r"written anew: shard-000001\.tar"):
        packed = pack_to(tmp_path / "packed", source)
    assert packed.kept == 19
    assert files(tmp_path / "packed") == whole
    after = touched(tmp_path / "packed")
    assert [name for name in sorted(before) if before[name] != after[name]] == ["shard-000001.tar"]


# -- bad images, a source that goes, a full disk --------------------------------------------------


@contextmanager
def _raising(table: Any, errors: dict[int, Exception]) -> Iterator[None]:
    table.errors = errors
    yield
    table.errors = {}


def test_what_cannot_be_used_is_left_out_with_its_reason_also_in_later_runs(photos, tmp_path):
    index = _of_table(photos, tmp_path)
    table: Any = index.source.whole  # type: ignore[union-attr]
    table.images[3] = damaged_png()
    table.images[9] = table.images[12]
    table.images[13] = table.images[13][:200]
    with _raising(table, {1: KeyError("lost\tits key"), 17: FileNotFoundError("x")}):
        packed = pack_to(tmp_path / "packed", index)
    words = {1: "lost", 3: "changed since", 9: "changed since", 13: "cut off|truncated", 17: "no such file"}
    names = {f"https://host/{row:02d}": word for row, word in words.items()}
    assert packed.left_out.keys() == names.keys()
    for name, word in names.items():
        assert re.search(word, packed.left_out[name])
    assert packed.copied == len(from_shards(tmp_path / "packed")) == 24 - 5
    good = [row for row in range(24) if row not in words]
    assert encoded(from_shards(tmp_path / "packed")) == encoded(index.subset(good))
    assert from_shards(tmp_path / "packed").labels.tolist() == index.labels[good].tolist()
    whole = files(tmp_path / "packed")
    assert bad_list.load(tmp_path / "packed" / "left_out.txt") == packed.left_out
    # The table gives all images now; what was left out of a finished shard stays on the list.
    (tmp_path / "packed" / "left_out.txt").unlink()
    (tmp_path / "packed" / "shard-000004.tar").unlink()
    assert pack_to(tmp_path / "packed", index).left_out == packed.left_out
    assert files(tmp_path / "packed") == whole


def test_an_image_that_its_index_left_out_is_on_the_list_too(photos, tmp_path):
    copied = shutil.copytree(photos, tmp_path / "source")
    (copied / "bee" / "0001.jpg").write_bytes(b"no image")
    assert pack_to(tmp_path / "packed", from_folder(copied)).left_out.keys() == {"bee/0001.jpg"}
    assert "bee/0001.jpg\tnot an image" in (tmp_path / "packed" / "left_out.txt").read_text()


def test_an_image_that_is_listed_twice_is_in_the_copy_and_stays_in_what_the_list_leaves(photos, tmp_path):
    pictures = [file.read_bytes() for file in sorted(photos.rglob("*.jpg"))[:2]]
    twice = [("a.jpg", pictures[0]), ("b.jpg", pictures[1]), ("a.jpg", pictures[1]), ("c.jpg", b"no image")]
    index = SampleIndex.from_shards(write_shard(tmp_path / "twice.tar", twice), cache=False, progress=False)
    assert [path for path, _ in index.left_out] == ["twice.tar/a.jpg", "twice.tar/c.jpg"]
    assert pack_to(tmp_path / "packed", index).left_out.keys() == {"twice.tar/c.jpg"}
    assert encoded(index.without(tmp_path / "packed" / "left_out.txt")) == pictures
    assert pack(index, tmp_path / "folder", progress=False).left_out.keys() == {"twice.tar/c.jpg"}


def test_a_damaged_png_is_left_out_although_it_is_not_encoded_anew(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (60, 60)).save(image, "JPEG")
    index = SampleIndex.from_source(Table([damaged_png(), image.getvalue()]), progress=False)
    packed = pack_to(tmp_path / "packed", index)
    assert "cannot be decoded" in packed.left_out["row 0"]
    assert list(members(tmp_path / "packed")) == ["row 1.jpg"]


def test_a_shard_may_be_empty_but_not_all(photos, tmp_path):
    index = _of_table(photos, tmp_path)
    table: Any = index.source.whole  # type: ignore[union-attr]
    with _raising(table, dict.fromkeys(range(5), OSError("gone"))):
        assert pack_to(tmp_path / "packed", index).shards == 5
    assert encoded(from_shards(tmp_path / "packed")) == encoded(index)[5:]
    with (
        _raising(table, dict.fromkeys(range(24), OSError("gone"))),
        pytest.raises(ValueError, match="None of"),
    ):
        pack_to(tmp_path / "none", index)


def test_a_class_without_a_usable_image_is_told_and_can_be_mended(photos, tmp_path):
    copied = shutil.copytree(photos, tmp_path / "source")
    source = from_folder(copied)
    for file in (copied / "ant").iterdir():
        file.write_bytes(b"no image any more")
    with pytest.warns(UserWarning, match=r"\['ant'\] is usable"):
        pack_to(tmp_path / "packed", source)
    pack_to(tmp_path / "anew", source.without(tmp_path / "packed" / "left_out.txt"))
    assert from_shards(tmp_path / "anew").labels.tolist() == [1] * 8 + [2] * 8


@pytest.mark.parametrize("error", [SourceGoneError("unplugged"), ConnectionResetError("unplugged")])
def test_a_source_that_is_gone_ends_the_run_and_the_next_one_goes_on(photos, tmp_path, error):
    index = _of_table(photos, tmp_path)
    table: Any = index.source.whole  # type: ignore[union-attr]
    pack_to(tmp_path / "whole", index)
    with (
        _raising(table, {12: error}),
        pytest.raises(SourceGoneError, match=r"is gone \(unplugged\); bring it back"),
    ):
        pack_to(tmp_path / "packed", index)
    assert sorted(file.name for file in (tmp_path / "packed").glob("*")) == [
        *("pack.json", "records", "shard-000000.tar", "shard-000001.tar")
    ]
    assert list((tmp_path / "packed").glob(".*")) == []
    packed = pack_to(tmp_path / "packed", index)
    assert (packed.kept, packed.left_out) == (10, {})
    assert files(tmp_path / "packed") == files(tmp_path / "whole")


def test_a_full_disk_is_told_in_a_sentence_and_leaves_nothing_half_written(source, tmp_path):
    # A limit on the size of files fails a write as a full disk does, and needs no disk of its own.
    pack_to(tmp_path / "whole", source, 20)
    sizes = [shard.stat().st_size for shard in sorted((tmp_path / "whole").glob("*.tar"))]
    assert sizes[1] < sizes[0]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0] - 1, before[1]))
        with pytest.raises(OSError, match=r"shard-000000\.tar' cannot be written .*make room") as raised:
            pack_to(tmp_path / "packed", source, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(raised.value)
    assert files(tmp_path / "packed").keys() == {"pack.json"}
    pack_to(tmp_path / "packed", source, 20)
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
    pack_to(tmp_path / "packed", source, short_side=50)
    before, rows = files(tmp_path / "packed"), np.arange(len(source))
    changed = source.subset(rows[options.pop("source", slice(None))])
    with pytest.raises(ValueError, match=f"was packed with .*{word}"):
        pack_to(tmp_path / "packed", changed, **{"short_side": 50, **options})
    assert files(tmp_path / "packed") == before


def test_other_things_the_source_itself_and_a_second_packer_are_refused(source, photos, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds other things"):
        pack_to(tmp_path / "other", source)
    with pytest.raises(ValueError, match="in its source"):
        pack_to(photos / "packed", source)
    pack(source, tmp_path / "copy", progress=False)
    with pytest.raises(ValueError, match="was packed with"):
        pack_to(tmp_path / "copy", source, short_side=256)
    pack_to(tmp_path / "packed", source, short_side=256)
    with pytest.raises(ValueError, match="per_shard 5"):
        pack(source, tmp_path / "packed", progress=False)
    handle = os.open(tmp_path / "packed", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="Another process"):
        pack_to(tmp_path / "packed", source, short_side=256)
    os.close(handle)
    assert pack_to(tmp_path / "packed", source, short_side=256).kept == 24
    assert {path.name for path in photos.iterdir()} == set(KINDS)


def test_a_copy_to_a_url_is_refused_and_no_folder_made_of_its_name(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in ("s3://bucket/copy", Path("s3://bucket/copy")):
        for write in (pack_shards, pack):
            with pytest.raises(ValueError, match="not to s3://bucket/copy; name one"):
                write(source, url, progress=False)
    assert not list(tmp_path.glob("s3*"))


@pytest.mark.parametrize("options", [{"short_side": 0}, {"quality": 101}, {"workers": 0}, {"per_shard": 0}])
def test_options_out_of_range_are_refused_before_anything_is_made(source, tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
        pack_to(tmp_path / "packed", source, **options)
    assert not (tmp_path / "packed").exists()


# -- the command ----------------------------------------------------------------------------------


def test_the_command_packs_shards_and_shards_of_shards(photos, tmp_path, capsys):
    packed = tmp_path / "packed"
    assert main(["pack", str(photos), str(packed), "--per-shard", "10"]) == 0
    assert "24 images in 3 shards: 0 re-encoded, 24 copied as they are; 0 left out" in capsys.readouterr().out
    shards = [str(shard) for shard in sorted(packed.glob("*.tar"))]
    assert main(["pack", *shards, str(tmp_path / "again")]) == 0
    assert members(tmp_path / "again") == members(packed)
    assert len(list((tmp_path / "again").glob("*.tar"))) == 1
    assert main(["pack", *shards, str(tmp_path / "numbers"), "--numbers"]) == 0
    assert set(members(tmp_path / "numbers").values()) > {b"0", b"1", b"2"}
    assert json.loads((packed / "pack.json").read_text())["per_shard"] == 10


def test_the_command_says_what_does_not_go_together(photos, tmp_path, capsys):
    assert main(["pack", str(photos), str(tmp_path / "copy"), "--folder", "--per-shard", "9"]) == 2
    assert capsys.readouterr().err.startswith("error: --per-shard")
    truth = {"images": [{"id": 1, "file_name": "ant/0000.jpg", "width": 50, "height": 50}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    command = ["pack", str(photos), str(tmp_path / "packed"), "--coco", str(tmp_path / "truth.json")]
    assert main(command) == 0
    assert "no boxes" in capsys.readouterr().err
    assert main(["pack", str(photos), str(tmp_path / "packed")]) == 2
    assert "was packed with source" in capsys.readouterr().err
