"""Checkpoints: what goes in comes out, and no kill leaves a folder without one."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainers.engine.checkpoint import LAST, PREVIOUS, load, save

WRITER = """
import sys, torch
from trainers.engine.checkpoint import save
step = 0
while True:
    print("writing", step, flush=True)
    save(sys.argv[1], {"step": step, "weights": torch.full((200_000,), float(step))})
    print("written", step, flush=True)
    step += 1
"""

# Before its n-th touch of the disk the child kills itself; n runs until a child gets through.
STEPPER = """
import os, signal, sys
from trainers.engine import checkpoint

def deadly(call, left):
    def wrapped(*args, **keys):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **keys)
    return wrapped

for n in range(1, 100):
    folder = f"{sys.argv[1]}/{n}"
    checkpoint.save(folder, {"step": 0})
    checkpoint.save(folder, {"step": 1})
    child = os.fork()
    if child == 0:
        left = [n]
        for name in ("fsync", "link", "unlink", "replace"):
            setattr(os, name, deadly(getattr(os, name), left))
        checkpoint.save(folder, {"step": 2})
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print(n, int(killed), flush=True)
    if not killed:
        break
"""


def test_tensors_arrays_text_and_numbers_come_back(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    state = {
        "net": net.state_dict(),
        "optimizer": torch.optim.AdamW(net.parameters()).state_dict(),
        "boxes": np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::-1],
        "partner": np.arange(3, dtype=">i8"),
        "numbers": [1, 2.5, True, None, "text", (1, 2)],
        "scalar": np.float32(1.5),
        "empty": np.zeros((0, 4), np.uint32),
    }
    save(tmp_path, state)
    back = load(tmp_path)
    assert torch.equal(back["boxes"], torch.from_numpy(np.ascontiguousarray(state["boxes"])))
    assert back["partner"].tolist() == [0, 1, 2]
    assert back["numbers"] == [1, 2.5, True, None, "text", (1, 2)]
    assert back["scalar"] == 1.5
    assert back["empty"].shape == (0, 4)
    other = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    other.load_state_dict(back["net"])
    assert torch.equal(other.get_parameter("0.weight"), net.get_parameter("0.weight"))
    assert back["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b": [1, {2}]}}, r"a\.b\[1\] is a set"),
        ({"a": np.array(["x"])}, "a is a ndarray"),
        ({"a": {(1, 2): 3}}, "key"),
    ],
)
def test_what_cannot_be_read_back_is_refused_and_leaves_the_last_one(
    tmp_path: Path, state: dict[str, object], words: str
) -> None:
    save(tmp_path, {"step": 1})
    with pytest.raises(TypeError, match=words):
        save(tmp_path, state)
    assert load(tmp_path) == {"step": 1}


def test_the_one_before_is_kept_and_nothing_else(tmp_path: Path) -> None:
    for step in range(3):
        save(tmp_path, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, PREVIOUS]
    assert load(tmp_path) == {"step": 2}
    assert torch.load(tmp_path / PREVIOUS, weights_only=True) == {"step": 1}


def test_a_tensor_that_repeats_its_numbers_comes_back(tmp_path: Path) -> None:
    save(tmp_path, {"wide": torch.arange(3.0).expand(1000, 3)})
    assert torch.equal(load(tmp_path)["wide"], torch.arange(3.0).expand(1000, 3))


@pytest.mark.parametrize("harm", ["truncate", "empty", "remove", "locator"])
def test_an_unreadable_last_falls_back_to_the_previous_with_a_warning(tmp_path: Path, harm: str) -> None:
    for step in range(2):
        save(tmp_path, {"step": step, "weights": torch.ones(1000)})
    last = tmp_path / LAST
    if harm == "remove":
        last.unlink()
    else:
        data = last.read_bytes()
        # An archive that is said to lie on two disks: zipfile raises where it should say no.
        parts = data[:-22] + b"PK\6\7" + b"\1" * 16 + data[-22:]
        last.write_bytes({"truncate": data[:2000], "empty": b"", "locator": parts}[harm])
    with pytest.warns(UserWarning, match=r"resuming from .*previous"):
        assert load(tmp_path)["step"] == 0
    save(tmp_path, {"step": 5})
    assert load(tmp_path)["step"] == 5
    assert torch.load(tmp_path / PREVIOUS, weights_only=True)["step"] == 0, "a broken last is not kept"


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


class Trap:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.folder,)


def legacy(path: Path) -> None:
    torch.save({"step": 1}, path, _use_new_zipfile_serialization=False)


def compressed(path: Path) -> None:
    save(path.parent / "other", {"step": 1, "weights": torch.zeros(10**6)})
    with zipfile.ZipFile(path.parent / "other" / LAST) as old, zipfile.ZipFile(path, "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def bomb(path: Path) -> None:
    torch.save({"step": torch.zeros(1).expand(10**13)}, path)


def nested(path: Path) -> None:
    tower: list[object] = []
    for _ in range(100):
        tower = [tower] * 100
    torch.save([tower], path)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: torch.save({"step": Trap(path.parent / "sprung")}, path), "holds more than tensors"),
        (legacy, "not a zip file"),
        (compressed, "a member is compressed"),
        (bomb, "claims more numbers than the file has"),
        (nested, "it holds a list"),
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


def test_lists_of_each_other_are_looked_at_once(tmp_path: Path) -> None:
    tower: list[object] = []
    for _ in range(100):
        tower = [tower] * 100
    torch.save({"step": tower}, tmp_path / LAST)
    assert list(load(tmp_path)) == ["step"]


@pytest.mark.parametrize("numbers", [1, 10**6])
def test_a_full_disk_is_told_and_leaves_both_checkpoints_and_no_draft(tmp_path: Path, numbers: int) -> None:
    for step in range(2):
        save(tmp_path, {"step": step})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / f".{LAST}.tmp").symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=r"last\.pt cannot be written \(No space left on device\); a .* stands"
    ) as full:
        save(tmp_path, {"weights": torch.zeros(numbers)})
    assert full.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save(tmp_path, {"step": 2})
    assert load(tmp_path) == {"step": 2}


def test_an_empty_folder_and_a_hopeless_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load(tmp_path)
    (tmp_path / LAST).write_bytes(b"no")
    (tmp_path / PREVIOUS).write_bytes(b"no")
    with pytest.raises(ValueError, match=r"can be read.*last\.pt.*previous\.pt"):
        load(tmp_path)


def test_a_kill_between_any_two_touches_of_the_disk_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    lines = subprocess.run(
        [sys.executable, "-c", STEPPER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ).stdout.split("\n")[:-1]
    assert len(lines) >= 6, "four kinds of calls in at least five places, and one child that lives"
    assert [line.split()[1] for line in lines] == ["1"] * (len(lines) - 1) + ["0"]
    for line in lines:
        folder = tmp_path / line.split()[0]
        assert load(folder)["step"] in (1, 2)
        save(folder, {"step": 3})
        assert load(folder)["step"] == 3
        assert sorted(path.name for path in folder.iterdir()) == [LAST, PREVIOUS]


def test_a_writer_killed_while_it_writes_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as writer:
        assert writer.stdout is not None
        done, begun = -1, -1
        for line in writer.stdout:
            word, number = line.split()
            if word == "written":
                done = int(number)
                state = load(tmp_path)  # read while the writer goes on
                assert state["step"] >= done
                assert bool((state["weights"] == state["step"]).all())
            else:
                begun = int(number)
                if begun == 20:
                    writer.send_signal(signal.SIGKILL)  # in the middle of a save
        assert writer.wait() == -signal.SIGKILL
    state = load(tmp_path)
    assert state["step"] >= done >= 19
    assert bool((state["weights"] == state["step"]).all())
    save(tmp_path, {"step": -1})
    assert load(tmp_path) == {"step": -1}
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, PREVIOUS]


def test_a_file_that_cannot_be_opened_now_is_not_called_damaged(tmp_path: Path) -> None:
    save(tmp_path, {"step": 1})
    save(tmp_path, {"step": 2})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        with pytest.raises(OSError, match="Too many open files"):
            load(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert load(tmp_path) == {"step": 2}
