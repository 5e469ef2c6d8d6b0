"""Checkpoints: what goes in comes out, and no kill leaves a folder without one."""

from __future__ import annotations

import errno
import resource
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import Trap
from touches import killed_at_every_touch

from trainers.engine.checkpoint import LAST, PREVIOUS, load, restore, save
from trainers.guides.kept_maps import KeptMaps


def test_tensors_arrays_text_and_numbers_come_back(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    plain = {"numbers": [1, 2.5, True, None, "text", (1, 2)], 3: {"a": []}}
    boxes = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::-1]
    arrays = {"boxes": boxes, "partner": np.arange(3, dtype=">i8"), "empty": np.zeros((0, 4), np.uint32)}
    wide = torch.arange(3.0).expand(1000, 3)  # it repeats its numbers
    optimizer = torch.optim.AdamW(net.parameters()).state_dict()
    networks = {"net": net.state_dict(), "optimizer": optimizer, "wide": wide, "scalar": np.float32(1.5)}
    save(tmp_path, {**plain, **arrays, **networks})
    back = load(tmp_path)
    assert {key: back[key] for key in plain} == plain
    for name, array in arrays.items():
        assert back[name].numpy().dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(back[name].numpy(), array)
    assert torch.equal(back["wide"], wide)
    assert back["scalar"] == 1.5
    torch.testing.assert_close(back["net"], net.state_dict(), atol=0, rtol=0)
    assert back["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


def test_a_state_without_an_entry_is_told_to_be_of_another_version() -> None:
    maps = KeptMaps(2, 3, 1.0, torch.device("cpu"))
    with pytest.raises(ValueError, match="the checkpoint's guide has no entry 'maps'"):
        restore({"guide": {"passes": 1}}, {"guide": maps})


def test_what_cannot_be_read_back_is_refused_and_leaves_the_last_one(tmp_path: Path) -> None:
    save(tmp_path, {"step": 1})
    for state, words in (({"a": {"b": [1, {2}]}}, r"a\.b\[1\] is a set"), ({"a": {(1, 2): 3}}, "key")):
        with pytest.raises(TypeError, match=words):
            save(tmp_path, state)
    assert load(tmp_path) == {"step": 1}


@pytest.mark.parametrize("harm", ["truncate", "empty", "remove"])
def test_an_unreadable_last_falls_back_to_the_previous_with_a_warning(tmp_path: Path, harm: str) -> None:
    for step in range(3):
        save(tmp_path, {"step": step, "weights": torch.ones(1000)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, PREVIOUS]
    last = tmp_path / LAST
    last.write_bytes(last.read_bytes()[: 2000 if harm == "truncate" else 0])
    if harm == "remove":
        last.unlink()
    with pytest.warns(UserWarning, match=r"resuming from .*previous"):
        assert load(tmp_path)["step"] == 1
    save(tmp_path, {"step": 5})
    assert load(tmp_path)["step"] == 5
    assert torch.load(tmp_path / PREVIOUS, weights_only=True)["step"] == 1, "a broken last is not kept"


def test_a_flipped_bit_falls_back_or_is_harmless(tmp_path: Path) -> None:
    for step in range(2):
        save(tmp_path, {"step": step, "weights": torch.full((200,), float(step))})
    data = (tmp_path / LAST).read_bytes()
    fell = 0
    for place in range(0, len(data), 13):
        (tmp_path / LAST).write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            state = load(tmp_path)
        fell += bool(told)
        assert state["step"] == (0 if told else 1)
        assert bool((state["weights"] == state["step"]).all())
    assert fell > len(data) // 13 // 2


def compressed(path: Path) -> None:
    save(path.parent / "other", {"step": 1, "weights": torch.zeros(10**6)})
    with zipfile.ZipFile(path.parent / "other" / LAST) as old, zipfile.ZipFile(path, "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def tower() -> list[object]:
    """Lists of each other, with more values than can be counted."""
    built: list[object] = []
    for _ in range(100):
        built = [built] * 100
    return built


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: torch.save({"step": Trap(path.parent / "sprung")}, path), "holds more than tensors"),
        (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), "not a zip file"),
        (compressed, "a member is compressed"),
        (lambda path: torch.save({"a": torch.zeros(1).expand(10**13)}, path), "more numbers than the file"),
        (lambda path: torch.save(tower(), path), "it holds a list"),
    ],
)
def test_a_hostile_checkpoint_executes_nothing_and_takes_no_memory(
    tmp_path: Path, harm: Callable[[Path], None], words: str
) -> None:
    harm(tmp_path / LAST)
    assert (tmp_path / LAST).stat().st_size < 100_000
    with pytest.raises(ValueError, match=words) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()
    torch.save({"step": tower()}, tmp_path / LAST)
    assert list(load(tmp_path)) == ["step"]  # each list is looked at once


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Inside, no file of this process grows beyond `size` bytes: what a full disk is to a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("numbers", [1, 10**6])
def test_a_full_disk_is_told_and_leaves_both_checkpoints_and_no_draft(tmp_path: Path, numbers: int) -> None:
    for step in range(2):
        save(tmp_path, {"step": step})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with files_of_at_most(64), pytest.raises(OSError, match=r"last\.pt cannot be written \(File too") as full:
        save(tmp_path, {"weights": torch.zeros(numbers)})
    assert full.value.errno == errno.EFBIG
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save(tmp_path, {"step": 2})
    assert load(tmp_path) == {"step": 2}


def test_an_empty_folder_and_a_hopeless_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load(tmp_path)
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes(b"no")
    with pytest.raises(ValueError, match=r"can be read.*last\.pt.*previous\.pt"):
        load(tmp_path)


def test_a_kill_between_any_two_touches_of_the_disk_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    keep = 'checkpoint.save(out, {{"step": {0}, "weights": torch.full((1000,), {0})}})'
    before = f"import torch; from trainers.engine import checkpoint\n{keep.format(0)}\n{keep.format(1)}"
    killed = killed_at_every_touch(before, keep.format(2), tmp_path)
    assert len(killed) >= 5, "a draft is opened, synced and renamed, and the last one kept"
    for folder in killed:
        state = load(folder)
        assert state["step"] in (1, 2)
        assert bool((state["weights"] == state["step"]).all())
        save(folder, {"step": 3})
        assert load(folder)["step"] == 3
        assert sorted(path.name for path in folder.iterdir()) == [LAST, PREVIOUS]
