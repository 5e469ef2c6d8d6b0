"""Large indexes are mapped into memory: the same content, verified, and one copy for all processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import noise_images
from tars import pack_folder

from dali_views import SampleIndex
from dali_views.system import archive

ARRAYS = ("paths", "sizes", "labels", "file_stamps", "places", "box_start", "boxes", "box_labels")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    images = noise_images(tmp_path_factory.mktemp("images"), 12)
    shards = pack_folder(images, tmp_path_factory.mktemp("shards"), 2)
    found = SampleIndex.from_shards(shards, cache=False, progress=False)
    names = [Path(found.path(row)).name for row in (0, 5)]
    return found.with_boxes({names[0]: [[0, 0, 0.5, 0.5]], names[1]: [[0.1, 0.2, 1, 1], [0, 0, 1, 0.3]]})


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAPPED_FROM", 0)


@pytest.mark.usefixtures("mapped")
def test_a_mapped_index_is_the_same(index, tmp_path):
    index.save(tmp_path / "index.npz")
    loaded = SampleIndex.load(tmp_path / "index.npz")
    for name in ARRAYS:
        one, other = getattr(index, name), getattr(loaded, name)
        assert np.array_equal(one, other), name
        assert one.dtype == other.dtype, name
    assert not loaded.paths.flags.writeable
    assert loaded.fingerprint == index.fingerprint
    assert loaded.subset([7, 2]).encoded(0) == index.encoded(7)
    # The file may be replaced: who has it mapped keeps what it read.
    index.subset([1]).save(tmp_path / "index.npz")
    assert np.array_equal(loaded.places, index.places)


@pytest.mark.usefixtures("mapped")
def test_no_damage_to_a_mapped_index_goes_unnoticed(index, tmp_path):
    index.save(tmp_path / "index.npz")
    whole = (tmp_path / "index.npz").read_bytes()
    draw = np.random.default_rng(0)
    refused = 0
    for trial in range(400):
        content = bytearray(whole)
        for _ in range(draw.integers(1, 4)):
            content[draw.integers(len(content))] ^= 1 << draw.integers(8)
        if trial % 4 == 0:
            content = content[: draw.integers(len(content))]
        (tmp_path / "index.npz").write_bytes(content)
        try:
            loaded = SampleIndex.load(tmp_path / "index.npz")
        except ValueError as error:
            assert "index.npz" in str(error)  # noqa: PT017
            refused += 1
        else:  # what was hit says nothing, as the date of a member does
            assert all(np.array_equal(getattr(index, name), getattr(loaded, name)) for name in ARRAYS)
    assert refused > 300


def test_a_large_index_takes_no_memory_of_its_own(tmp_path):
    count = 600_000
    names = np.char.add(np.char.zfill(np.arange(count).astype("S9"), 40), b".jpg")
    paths = names.view(np.uint8).reshape(count, -1)
    sizes = np.full((count, 2), 300, np.int32)
    SampleIndex("/images", paths, sizes, np.zeros(count, np.int32), ["a"]).save(tmp_path / "index.npz")
    size = (tmp_path / "index.npz").stat().st_size
    assert size > archive.MAPPED_FROM
    code = (
        "import sys; from dali_views import SampleIndex\n"
        "def own(): return next(line for line in open('/proc/self/smaps_rollup') if 'Anonymous' in line)\n"
        "before = own(); index = SampleIndex.load(sys.argv[1]); index.paths.sum(); print(before, own())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "index.npz")], capture_output=True, text=True, check=True
    )
    before, after = (1024 * int(number) for number in re.findall(r"(\d+) kB", run.stdout))
    # Checking takes a few megabytes, of which the allocator keeps some.
    assert after - before < 0.4 * size
