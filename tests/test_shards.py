"""Tar shards: the batches of the folder they were made of, and a reason for whatever is not used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import two_classes
from tars import add, pack_folder, write_shard

from dali_views import BadImageError, SampleIndex, View, ViewLoader, bad_list
from dali_views.data import source
from dali_views.data.headers import in_process
from dali_views.data.shards import list_shards
from dali_views.tools import cli
from trainers import config as cfg
from trainers import data

VIEWS = [View(size=8), View(size=8)]
SHARDS = 5


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twenty images each."""
    return two_classes(tmp_path_factory.mktemp("classes"), 20)


@pytest.fixture(scope="module")
def pattern(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same images in five shards."""
    return pack_folder(classes, tmp_path_factory.mktemp("shards"), SHARDS)


@pytest.fixture
def own(pattern: str, tmp_path: Path) -> Path:
    """A copy of the shards, to be broken."""
    return Path(shutil.copytree(Path(pattern).parent, tmp_path / "own"))


@pytest.fixture(scope="module")
def images(classes: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(classes.rglob("*.jpg"))]


def from_shards(pattern: Any) -> SampleIndex:
    return SampleIndex.from_shards(pattern, cache=False, progress=False)


def members(index: SampleIndex) -> list[str]:
    """The rows' names without their shards."""
    names = [os.path.relpath(index.path(row), index.root) for row in range(len(index))]
    return [name.partition(".tar/")[2] for name in names]


def rows_of(loader: ViewLoader) -> list[int]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Left out while running")
        return [row for batch in loader for row in batch.index.tolist()]


def test_a_batch_is_drawn_from_all_shards(pattern):
    index = from_shards(pattern)
    assert index.places is not None
    first = next(iter(ViewLoader(index, VIEWS, 20, device="cpu")))
    assert set(index.places[first.index.numpy(), 0].tolist()) == set(range(SHARDS))


def test_parts_of_an_index_read_their_own_images(images, pattern):
    part = from_shards(pattern).subset([31, 2, 17]).subset([2, 0])
    assert [part.encoded(0), part.encoded(1)] == [images[17], images[31]]


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ("part-000.tar", [0]),
        ("part-*.tar", [0, 1, 2, 3, 4]),
        ("part-{000..004}.tar", [0, 1, 2, 3, 4]),
        ("part-00{4,1}.tar", [4, 1]),
        ("list.txt", [2, 3, 4]),
        (["part-003.tar", "part-00[03].tar", "part-{000..001}.tar"], [3, 0, 1]),
    ],
)
def test_shards_are_named_by_path_list_glob_braces_and_file(own, given, numbers):
    (own / "list.txt").write_text("# shards\npart-002.tar\n\npart-00{3..4}.tar\n")
    found = list_shards(own / given if isinstance(given, str) else [own / each for each in given])
    assert found == [str(own / f"part-{number:03d}.tar") for number in numbers]


@pytest.mark.parametrize("pattern", ["{0..999999999999}.tar", "{0..99999}{0..99999}.tar"])
def test_a_pattern_of_too_many_shards_is_refused(tmp_path, pattern):
    with pytest.raises(ValueError, match="more than"):
        list_shards(tmp_path / pattern)


def test_a_pattern_of_no_shards_is_refused(tmp_path):
    (tmp_path / "shard.bin").write_bytes(bytes(1024))
    for pattern, words in (("{0..9}.tar", "no shard"), ("shard.bin", "is read as a list of shards")):
        with pytest.raises(FileNotFoundError, match=words):
            list_shards(tmp_path / pattern)
    with pytest.raises(IsADirectoryError, match=r"is a folder; name the shards in it, as '.*/\*\.tar'"):
        list_shards(tmp_path)


def test_an_image_has_the_label_of_its_key(images, tmp_path):
    texts = {
        "0": {"0.cls": b"2\n", "0.jpg": b""},
        "1": {"1.left.jpg": b"", "1.right.jpg": b"", "1.json": b'{"label": 4}'},
        "2": {"2.jpg": b"", "2.json": b'{"class_id": 1}', "2.cls": b"3"},
        "3": {"./3.jpg": b"", "3.json": b'{"class_id": 1}'},
        "4": {"4.jpg": b"", "4.json": b'{"label": "4"}'},
        "5": {"5.jpg": b"", "5.json": b"[4]"},
        "6": {"6.jpg": b"", "6.cls": b"\xff\xfe"},
        "other/0": {"other/0.jpg": b""},
    }
    held = [(name, text or images[0]) for group in texts.values() for name, text in group.items()]
    index = from_shards(write_shard(tmp_path / "a.tar", held))
    assert members(index) == [name.removeprefix("./") for name, _ in held if name.endswith(".jpg")]
    assert index.labels.tolist() == [2, 4, 4, 3, 1, -1, -1, -1, -1]
    assert index.classes == ["0", "1", "2", "3", "4"]
    assert index.left_out == []


# -- what is refused ------------------------------------------------------------------------------


def test_a_label_beside_a_long_caption_is_read_and_one_in_a_longer_file_told(images, tmp_path):
    held = []
    for key, length in (("a", 1 << 17), ("b", 1 << 20)):
        facts = json.dumps({"caption": "x" * length, "label": 1}).encode()
        held += [(f"{key}.jpg", images[0]), (f"{key}.json", facts)]
    index = from_shards(write_shard(tmp_path / "x.tar", held))
    assert index.labels.tolist() == [1, -1]
    ((path, reason),) = index.left_out
    assert path == "x.tar/b.json"
    assert "longer than the 1048576 bytes of a label file" in reason


def test_a_shard_that_another_was_appended_to_is_told(own):
    whole = (own / "part-000.tar").read_bytes()
    (own / "part-000.tar").write_bytes(whole + (own / "part-001.tar").read_bytes())
    with (own / "part-002.tar").open("ab") as file:
        file.write(bytes(1 << 16))  # the end of a tar with long records
    index = from_shards(own / "*.tar")
    assert len(index) == 40
    ((path, reason),) = index.left_out
    assert path == "part-000.tar"
    assert re.fullmatch(r"ends at byte \d+; what follows, as a tar that was appended, is not read", reason)


def test_members_that_must_not_be_read_are_left_out_with_the_reason(images, tmp_path):
    left_out = {
        "/etc/absolute.jpg": ("out of the shard", {}),
        "a/../../up.jpg": ("out of the shard", {}),
        "link.jpg": ("a link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        "hard.jpg": ("a link", {"type": tarfile.LNKTYPE, "linkname": "good.jpg"}),
        "device.jpg": ("no regular file", {"type": tarfile.CHRTYPE}),
        "pipe.jpg": ("no regular file", {"type": tarfile.FIFOTYPE}),
        "sparse.jpg": ("sparse", {"type": tarfile.GNUTYPE_SPARSE}),
        "good.jpg": ("twice", {}),
        "empty.jpg": ("empty", {}),
    }
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "good.jpg", images[0])
        for name, (_, header) in left_out.items():
            add(tar, name, images[1] if name in ("good.jpg", "sparse.jpg") else b"", **header)
        add(tar, "folder.jpg", type=tarfile.DIRTYPE)
        add(tar, "last.jpg", images[3])
    index = from_shards(tmp_path / "a.tar")
    assert members(index) == ["good.jpg", "last.jpg"]
    assert index.encoded(0) == images[0]
    reasons = {os.path.basename(path): reason for path, reason in index.left_out}
    words = {os.path.basename(name): word for name, (word, _) in left_out.items()}
    assert reasons.keys() == words.keys()
    assert all(word in reasons[name] for name, word in words.items())


def test_other_members_are_never_read(images, tmp_path):
    """Bytes that would fail a run if anybody decoded or unpickled them lie between the images."""
    trap = b"cos\nabort\n(tR."
    names = ["0.pyd", "0.pkl", "0.pickle", "0.npy", "0.pt", "0.txt", "__index__.py"]
    shard = write_shard(tmp_path / "a.tar", [*((name, trap) for name in names), ("0.jpg", images[0])])
    index = from_shards(shard)
    assert members(index) == ["0.jpg"]
    assert (index.labels.tolist(), index.left_out) == ([-1], [])
    assert rows_of(ViewLoader(index, VIEWS, 1, device="cpu")) == [0]


@pytest.mark.parametrize("magic", [b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh9", b"\x28\xb5\x2f\xfd"])
def test_a_compressed_shard_is_left_out_with_the_fix(own, magic):
    (own / "part-005.tar.gz").write_bytes(magic + bytes(2000))
    index = from_shards(own / "part-*.tar*")
    assert len(index) == 40
    ((name, reason),) = index.left_out
    assert name == "part-005.tar.gz"
    assert "unpack it with" in reason


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda content, at: content[: at + 700], "truncated"),  # in the pixels of the fifth image
        (lambda content, at: content[: at + 100], "truncated"),  # in its header
        (lambda content, at: content[:at], "truncated"),  # between two members
        (lambda content, at: content[:at] + b"\xaa" * 512 + content[at + 512 :], "damaged"),
        (lambda content, at: content[: at + 124] + b"\xff" * 12 + content[at + 136 :], "damaged"),
    ],
)
def test_of_a_damaged_shard_what_is_whole_is_used(own, damage, word):
    shard = own / "part-000.tar"
    with tarfile.open(shard) as tar:
        at = [member.offset for member in tar if member.name.endswith(".jpg")][4]
    shard.write_bytes(damage(shard.read_bytes(), at))
    index = from_shards(own / "*.tar")
    assert len(index) == 32 + 4
    assert all(path.startswith("part-000.tar") for path, _ in index.left_out)
    assert any(word in reason for _, reason in index.left_out)
    assert sorted(rows_of(ViewLoader(index, VIEWS, 4, device="cpu", on_bad_image="raise"))) == list(range(36))


def test_what_is_no_shard_or_is_not_there_is_left_out(own):
    (own / "part-005.tar").write_bytes(b"this is no tar" * 100)
    (own / "part-006.tar").write_bytes(b"")
    (own / "part-007.tar").mkdir()
    os.mkfifo(own / "part-008.tar")
    index = from_shards(own / "part-{000..009}.tar")
    reasons = dict(index.left_out)
    assert len(index) == 40
    assert [reasons.pop(f"part-00{n}.tar") for n in (5, 6, 9)] == ["no tar", "no tar", "no such file"]
    assert all("not a regular file" in reason for reason in reasons.values())
    assert len(reasons) == 2


def test_shards_without_a_usable_image_are_an_error(tmp_path):
    for held, reason in (([("0.jpg", b"no image")], "a.tar/0.jpg: not an image"), ([], "they are empty")):
        with pytest.raises(ValueError, match=rf"no usable image \({reason}"):
            from_shards(write_shard(tmp_path / "a.tar", held))


@pytest.mark.parametrize("claim", ["size", "long name", "negative size"])
def test_a_made_up_header_costs_neither_memory_nor_time(images, tmp_path, claim):
    shard = write_shard(tmp_path / "a.tar", [("0.jpg", images[0])])
    content = shard.read_bytes()[: 512 + -(-len(images[0]) // 512) * 512]
    member = tarfile.TarInfo("1.jpg")
    member.size = -1024 if claim == "negative size" else 1 << 40
    member.type = tarfile.GNUTYPE_LONGNAME if claim == "long name" else tarfile.REGTYPE
    shard.write_bytes(content + member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with shard.open("ab") as file:
        file.truncate(1 << 33)  # eight gigabytes that take no room
    index = from_shards(shard)
    assert members(index) == ["0.jpg"]
    assert index.left_out


def test_worker_processes_run_nothing_that_lies_in_the_current_folder(own):
    (own / "pickle.py").write_text("open('ran', 'w')")
    line = "from_shards('part-*.tar', cache=False, processes=1, progress=False)"
    script = own.with_name("script.py")
    script.write_text(f"import dali_views; print(len(dali_views.SampleIndex.{line}))")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    words = [sys.executable, str(script)]
    found = subprocess.run(words, cwd=own, env=environment, capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("40\n", 0), found.stderr
    assert not (own / "ran").exists()


def test_a_worker_that_dies_is_told_with_its_work():
    with pytest.raises(RuntimeError, match=r"process died \(7\) at work on 7 .*; pass processes=0"):
        in_process(os._exit, [7])  # type: ignore[arg-type]


# -- shards that change ---------------------------------------------------------------------------


def test_the_scan_is_kept_until_a_shard_changes(own, tmp_path, images):
    def scan(pattern: str = "part-*.tar") -> SampleIndex:
        return SampleIndex.from_shards(own / pattern, cache=tmp_path / "cache", progress=False)

    first = scan()
    (kept,) = (tmp_path / "cache").iterdir()
    stamp = kept.stat().st_mtime_ns
    assert scan().fingerprint == first.fingerprint
    assert kept.stat().st_mtime_ns == stamp
    write_shard(own / "part-002.tar", [("new.jpg", images[0])])
    assert len(scan()) == 33
    assert kept.stat().st_mtime_ns != stamp
    write_shard(own / "part-009.tar", [("new.jpg", images[0])])
    assert len(scan()) == 34


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda shard: shard.unlink(), "no such file"),
        (lambda shard: write_shard(shard, [("0.jpg", b"")]), "has changed since it was indexed"),
    ],
)
def test_a_shard_that_is_gone_or_another_costs_its_images(own, change, word):
    index = from_shards(own / "part-*.tar")
    change(own / "part-001.tar")
    loader = ViewLoader(index, VIEWS, 8, device="cpu", max_bad_share=0.5)
    assert set(rows_of(loader)) == set(range(40)) - set(range(8, 16))
    assert all("part-001.tar" in path and word in why for path, why in index.quarantine.items())
    assert len(index.quarantine) == 8
    strict = ViewLoader(index, VIEWS, 8, device="cpu")
    with pytest.raises(BadImageError, match="of 40 images cannot be read"):
        rows_of(strict)


def test_shards_cut_off_while_they_are_read_cost_what_is_lost(own):
    index = from_shards(own / "part-*.tar")
    assert index.places is not None
    loader = ViewLoader(index, VIEWS, 8, device="cpu", max_bad_share=0.5)
    assert len(rows_of(loader)) == 40
    at = int(index.places[12, 1]) + 100
    os.truncate(own / "part-001.tar", at)
    loader.set_epoch(1)
    assert set(rows_of(loader)) == set(range(40)) - set(range(12, 16))
    assert {why for why in index.quarantine.values()} == {
        "cannot be read (part-001.tar was truncated since it was indexed)"
    }


def test_shards_whose_folder_is_gone_end_the_run_and_blame_no_image(own):
    index = from_shards(own / "part-*.tar")
    own.rename(own.with_name("elsewhere"))
    with pytest.raises(BadImageError, match="is gone, for example unmounted"):
        rows_of(ViewLoader(index, VIEWS, 8, device="cpu"))
    assert not index.quarantine


def test_no_more_descriptors_are_open_than_allowed(images, tmp_path):
    many = [write_shard(tmp_path / f"{n:03d}.tar", [("0.jpg", images[n % 40])]) for n in range(300)]
    index = from_shards(many)
    before = len(os.listdir("/proc/self/fd"))
    for epoch in range(2):
        loader = ViewLoader(index, VIEWS, 50, device="cpu", seed=epoch)
        assert len(set(rows_of(loader))) == 300
    assert len(os.listdir("/proc/self/fd")) - before <= 256 + 32  # DALI has some of its own


def test_a_file_stays_open_as_long_as_somebody_reads_it(own, monkeypatch):
    index = from_shards(own / "part-*.tar")
    picture, read = index.encoded(3), os.pread

    def while_others_open_theirs(*place: int) -> bytes:
        source._opened.cache_clear()
        return read(*place)

    monkeypatch.setattr(os, "pread", while_others_open_theirs)
    assert index.encoded(3) == picture


def test_the_command_line_takes_shards(own, tmp_path, capsys):
    shards = [str(own / f"part-00{n}.tar") for n in range(SHARDS)]  # as a shell expands braces
    assert cli.main(["index", *shards]) == 0
    told = capsys.readouterr().out
    assert cli.main(["index", str(own / "part-{000..004}.tar")]) == 0
    assert capsys.readouterr().out == told
    assert "40 images in 2 classes" in told
    content = bytearray((own / "part-000.tar").read_bytes())
    with tarfile.open(own / "part-000.tar") as tar:
        member = tar.getmember("ant/0003.jpg")
    content[member.offset_data + 20 : member.offset_data + member.size - 20] = bytes(member.size - 40)
    (own / "part-000.tar").write_bytes(content)
    assert cli.main(["check", *shards, "--out", str(tmp_path / "bad.txt"), "--device", "cpu"]) == 1
    assert [Path(path).name for path in bad_list.load(tmp_path / "bad.txt")] == ["0003.jpg"]
    assert cli.main(["index", str(own), str(own)]) == 2
    assert "Only of tar shards" in capsys.readouterr().err


def test_a_run_reads_shards(pattern):
    sets = data.open_data(cfg.Data(kind="shards", path=pattern, val_share=0.2))
    assert (len(sets.train), sets.train.classes) == (32, ["ant", "bee"])
    assert sets.queries is not None
    assert sets.queries.encoded(0)
