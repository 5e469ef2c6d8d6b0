"""Hostile files: each ends in a sentence or costs one image, within a bound of time and memory.

A process of its own handles each case, so that one that hangs, dies or takes the memory fails alone.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import noise_images
from PIL import Image
from test_fuzz import Judge, peak

from dali_views import RegionTable, SampleIndex, View, ViewLoader
from dali_views.system.files import save_arrays
from dali_views.tools.check import check

LIMIT_S = 300  # far more than any of them takes: a hang is what this ends
LIMIT_MB = 200  # over the process as it is when it has read sound files of the kind
QUIET = {"cache": False, "progress": False}


def sparse(file: Path) -> None:
    """A PNG whose header is sound and 6 GB of zeros, which take no room on the disk."""
    Image.new("RGB", (40, 40)).save(file, "PNG")
    os.truncate(file, 6 << 30)


def replaced(folder: Path) -> Callable[[], str]:
    """The loader and `check` on images, one of which was replaced after it was indexed."""
    index = SampleIndex.from_folder(folder, **QUIET)
    loader = ViewLoader(index, [View(size=8)], 10, device="cpu", max_bad_share=0.5)
    assert sorted(row for batch in loader for row in batch.index.tolist()) == list(range(20))
    check(index, device="cpu", threads=1)
    file = Path(index.path(7))
    file.unlink()
    (folder / "hostile").rename(file)

    def act() -> str:
        rows = [row for batch in loader for row in batch.index.tolist()]
        assert len(rows) == 20
        assert 7 not in rows
        assert list(index.quarantine) == list(check(index, device="cpu", threads=1)) == [str(file)]
        return index.quarantine[str(file)]

    return act


def indexed(folder: Path) -> Callable[[], str]:
    """A folder that one more file has come into, before it is indexed."""
    bad = (folder / "hostile").rename(folder / "hostile.bin")
    assert not SampleIndex.from_folder(folder, **QUIET).left_out
    bad.rename(folder / "bad.png")

    def act() -> str:
        (bad,) = SampleIndex.from_folder(folder, **QUIET).left_out
        return bad.reason

    return act


def webp(file: Path) -> None:
    """A WebP, which Pillow reads as a whole, of 1 GB of zeros."""
    Image.new("RGB", (40, 40)).save(file, "WEBP", lossless=True)
    head = bytearray(file.read_bytes())
    head[4:8] = ((1 << 30) - 8).to_bytes(4, "little")
    file.write_bytes(head)
    os.truncate(file, 1 << 30)


def long_tag(file: Path) -> None:
    """A TIFF with a tag of 1 GB of zeros."""
    Image.new("RGB", (4, 4)).save(file, "TIFF", tiffinfo={270: "x" * 100})
    head = bytearray(file.read_bytes())
    start = head.index(struct.pack("<HHI", 270, 2, 101))
    head[start + 4 : start + 8] = (1 << 30).to_bytes(4, "little")
    file.write_bytes(head)
    os.truncate(file, (1 << 30) + (1 << 20))


def boxes(*shape: int, partners: int = 3) -> Callable[[Path], None]:
    """A region table whose boxes claim a shape, with a checksum that is right."""

    def write(file: Path) -> None:
        columns = RegionTable(3).state_dict()
        facts = {name: columns.pop(name) for name in ("epoch", "fingerprint")}
        columns["boxes"] = np.zeros(shape, np.float32)
        columns["partner"] = np.arange(partners)
        save_arrays(file, columns, facts)

    return write


def regions(folder: Path) -> Callable[[], str]:
    RegionTable(3).save(folder / "sound")
    assert len(RegionTable.load(folder / "sound")) == 3
    return lambda: refusal(lambda: RegionTable.load(folder / "hostile"))


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as told:
        load()
    return str(told.value)


def table(folder: Path) -> Callable[[], str]:
    """A small table, a group of which unpacks to gigabytes, after a sound one."""
    images = [file.read_bytes() for file in sorted(folder.glob("*.jpg"))]
    pq.write_table(pa.table({"image": images, "label": ["a", "b"] * 10}), folder / "sound.parquet")
    assert len(SampleIndex.from_table(folder / "sound.parquet", **QUIET)) == 20
    bad = (folder / "hostile").rename(folder / "bad.parquet")
    assert bad.stat().st_size < 8 << 20
    return lambda: refusal(lambda: SampleIndex.from_table(bad, **QUIET))


def of_zeros(file: Path) -> None:
    zeros = pa.chunked_array([pa.array([bytes(32 << 20)])] * 10)
    labels = pa.array(["a"] * 10)
    pq.write_table(
        pa.table({"image": zeros, "label": labels}), file, compression="zstd", use_dictionary=False
    )


def with_a_footer_that_lies(file: Path) -> None:
    """The size of the unpacked images in the footer, but not in the pages, is that of small ones."""
    of_zeros(file)
    wrong = pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size
    content = file.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = content[start:-8].replace(varint(wrong), varint(1 << 20))
    file.write_bytes(content[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    assert pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size == 1 << 20


def varint(number: int) -> bytes:
    """A number as Thrift writes it."""
    number, out = 2 * number, b""
    while number > 127:
        number, out = number >> 7, out + bytes([number & 127 | 128])
    return out + bytes([number])


def repeated(file: Path) -> None:
    """One value of 2 MB in a dictionary, for 2,000 rows."""
    pages = {"dictionary_pagesize_limit": 1 << 30, "compression": "none"}
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), [os.urandom(2 << 20)])
    part = pa.table({"image": images, "label": pa.array(["a"] * 2000)})
    pq.write_table(part, file, store_schema=False, **pages)


def of_one_word(file: Path) -> None:
    """One word of 2 MB in a dictionary, for 2,000 rows."""
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), ["w" * (2 << 20)])
    images = pa.array([(file.parent / "0000.jpg").read_bytes()] * 2000)
    part = pa.table({"image": images, "label": words})
    with pa.ipc.new_stream(str(file), part.schema) as writer:
        writer.write_table(part)


def of_nothing(file: Path) -> None:
    """Twenty million rows without an image."""
    nulls = pa.table({"image": pa.nulls(20_000_000, pa.binary())})
    pq.write_table(nulls, file, row_group_size=20_000_000)


def arrow(file: Path) -> None:
    zeros = pa.table({"image": [bytes(320 << 20)], "label": ["a"]})
    with pa.ipc.new_stream(str(file), zeros.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as to:
        to.write_table(zeros)


def judge(case: str, folder: Path) -> str:
    """Reads sound files of the kind, then the hostile one; its outcome, or an error if it takes too much."""
    warnings.simplefilter("ignore")
    act = CASES[case][1](folder)
    before = peak()
    outcome = act()
    if (rise := peak() - before) > LIMIT_MB:
        raise RuntimeError(f"{outcome}, but it takes {rise:.0f} MB")
    return f"{outcome} ({rise:.0f} MB)"


Case: TypeAlias = tuple[Callable[[Path], object], Callable[[Path], Callable[[], str]], str]
CASES: dict[str, Case] = {
    "replaced by a pipe": (os.mkfifo, replaced, "not a regular file"),
    "replaced by zeros": (lambda file: file.symlink_to("/dev/zero"), replaced, "not a regular file"),
    "replaced by noise": (lambda file: file.symlink_to("/dev/urandom"), replaced, "not a regular file"),
    "replaced by a folder": (Path.mkdir, replaced, "not a regular file"),
    "replaced by 6 GB": (sparse, replaced, "6442450944 bytes, more than"),
    "sparse image": (sparse, indexed, "6442450944 bytes, more than its 40 x 40 pixels can take"),
    "sparse WebP": (webp, indexed, "a file that is read as a whole, exceeds 64 MB"),
    "sparse tag": (long_tag, indexed, "exceeds 64 MB"),
    "boxes of no numbers": (boxes(10**9, 1, 0), regions, "claims [1000000000, 1, 0], more than the file"),
    "more boxes than numbers are": (boxes(10**12, 1, 0), regions, "more than the file can hold"),
    "partners of nobody": (boxes(3, 1, 4, partners=40), regions, "(3, 1, 4) for 40 partners"),
    "zeros": (of_zeros, table, "claim to unpack to"),
    "zeros and a footer that lies": (with_a_footer_that_lies, table, "claim to unpack to"),
    "one image for all rows": (repeated, table, "bytes unpack to more than"),
    "one word for all rows": (of_one_word, table, "the words of its 2000 rows have"),
    "rows without images": (of_nothing, table, "it claims 20000000 rows, more than"),
    "Arrow of zeros": (arrow, table, "it is compressed"),
}
"""What makes the hostile file, what is ready to read it, and words of the outcome."""


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_file_costs_little_and_is_told(tmp_path, case):
    noise_images(tmp_path / "images", 20)
    judging = Judge(tmp_path / "log", judge, LIMIT_S)
    make, _, words = CASES[case]
    make(tmp_path / "images" / "hostile")
    outcome, finding = judging(case, tmp_path / "images")
    judging.stop()
    assert not finding
    assert words in outcome


STUCK = """
import os, signal, threading
import numpy as np
from dali_views import SampleIndex, View, ViewLoader
from trainers.engine.interrupt import Interrupt

class Stuck:
    def __len__(self):
        return 8

    def read(self, rows):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()

index = SampleIndex.from_source(Stuck(), sizes=np.full((8, 2), 8))
with Interrupt(patience=0.1) as interrupt:
    for _ in interrupt.batches(ViewLoader(index, [View(size=8)], 4, device="cpu")):
        pass
"""


def test_a_signal_ends_a_run_that_waits_for_a_batch():
    run = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=LIMIT_S)
    assert run.returncode == -signal.SIGTERM
    assert "No batch came within 0.1 s after the signal" in run.stderr
