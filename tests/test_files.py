"""Files of arrays: what was saved comes back, damage of any kind ends in one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dali_views.system.files import append_line, load_arrays, save_arrays

ARRAYS = {
    "empty": np.zeros((0, 4), np.float32),
    "flags": np.array([True, False, True]),
    "numbers": np.arange(10, dtype=np.int64)[::-2],
    "pixels": np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1),
}
FACTS = {"epoch": 3, "fingerprint": "añ", "names": ["a", "b"]}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    save_arrays(tmp_path / "new" / "a.safetensors", ARRAYS, FACTS)
    return tmp_path / "new" / "a.safetensors"


def test_what_was_saved_comes_back_and_outlives_the_file(stored):
    with load_arrays(stored, "table") as (arrays, facts):
        save_arrays(stored, {}, {})
        assert facts == FACTS
        assert arrays.keys() == ARRAYS.keys()
        for name, array in arrays.items():
            assert np.array_equal(array, ARRAYS[name])
            assert array.dtype == ARRAYS[name].dtype
            assert not array.flags.writeable
    assert [file.name for file in stored.parent.iterdir()] == [stored.name]


def test_no_damage_goes_unnoticed(stored):
    whole = stored.read_bytes()
    for place in range(0, len(whole), 3):
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]):
            stored.write_bytes(content)
            try:
                with load_arrays(stored, "table"):
                    pass
            except ValueError as error:
                told = str(error)
                assert re.match(r".*a\.safetensors is not a readable table .*; delete it", told)
                assert "\n" not in told
            else:
                raise AssertionError(place)


def test_a_missing_file_and_a_block_that_fails_are_told(stored, tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"no table at .*none"),
        load_arrays(tmp_path / "none", "table"),
    ):
        pass
    with pytest.raises(ValueError, match=r"not a readable table.*it has no x"), load_arrays(stored, "table"):
        raise KeyError("it has no x")


def test_a_large_file_takes_no_memory_of_its_own(tmp_path):
    size = 48 << 20
    save_arrays(tmp_path / "a", {"x": np.ones(size, np.uint8)}, {})
    code = (
        "import sys; from dali_views.system.files import load_arrays\n"
        "def own(): return next(line for line in open('/proc/self/smaps_rollup') if 'Anonymous' in line)\n"
        "before = own()\n"
        "with load_arrays(sys.argv[1], 'table') as (arrays, _): arrays['x'].sum(); print(before, own())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=True
    )
    before, after = (1024 * int(number) for number in re.findall(r"(\d+) kB", run.stdout))
    assert after - before < 0.2 * size


def test_a_reader_beside_two_writers_gets_a_whole_file(tmp_path):
    path, stop, errors = tmp_path / "a.safetensors", threading.Event(), []
    save_arrays(path, {"x": np.zeros(1000)}, {"n": 0})

    def read() -> None:
        while not stop.is_set():
            with load_arrays(path, "table") as (arrays, facts):
                assert (arrays["x"] == facts["n"]).all()

    def write() -> None:
        for n in range(200):
            save_arrays(path, {"x": np.full(1000 + n, n)}, {"n": n})

    def noted(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    reader, *writers = (threading.Thread(target=noted, args=[work]) for work in (read, write, write))
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not errors
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    """Also where the system names no file, or that of the draft."""
    (tmp_path / "file").touch()
    for write in (
        lambda path: append_line(path, "a"),
        lambda path: save_arrays(path, {}, {}),
    ):
        for path in (tmp_path / ("a" * 300), tmp_path):
            with pytest.raises(OSError, match=re.escape(f"'{path}'")):
                write(path)
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        append_line("/dev/full", "a")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_the_library_reads_what_is_written(tmp_path):
    arrays = {"a": np.arange(3, dtype=np.uint8), "b": np.eye(2), "c": np.zeros((0, 4), np.float32)}
    save_arrays(tmp_path / "a", arrays, {})
    found = load_file(tmp_path / "a")
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
