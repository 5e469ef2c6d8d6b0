"""Checkpoints: what goes in comes out, and no kill leaves a folder without one."""

from __future__ import annotations

import copy
import errno
import functools
import resource
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutations import Trap
from touches import killed_at_every_touch

from dali_views import RegionTable
from dali_views.system.stored import whole
from trainers.engine.checkpoint import LAST, PREVIOUS, load, save
from trainers.engine.optim import Lars
from trainers.engine.restore import restore
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


def parts(kind: Callable[..., torch.optim.Optimizer], steps: int) -> dict[str, Any]:
    """What a run keeps, after some steps."""
    torch.manual_seed(steps)
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer, maps, regions = kind(net.parameters(), lr=0.1), KeptMaps(4, 2, 1.0, CPU), RegionTable(4)
    for step in range(steps):
        optimizer.zero_grad()
        net(torch.randn(5, 2)).square().sum().backward()
        optimizer.step()
        maps.put(torch.tensor([step]), torch.rand(1, 2, 2))
        regions.update([step], weights=[0.5])
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    return {"net": net, "optimizer": optimizer, "scaler": scaler, "regions": regions, "maps": maps}


def states(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """Every number of nested states by its place, bit for bit."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, item in items for k, v in flat(item, f"{place}.{name}").items()}
    return {place: np.asarray(value).tobytes() if hasattr(value, "shape") else value}


def changed(state: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The state with another value at a path; GONE removes it."""
    *outer, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    place: Any = state
    for key in outer:
        place = place[key]
    if value is GONE:
        del place[last]
    else:
        place[last] = value(place[last]) if callable(value) else value
    return state


CPU, GONE = torch.device("cpu"), object()
NAN = torch.full((3,), torch.nan)
ADAM, SGD = torch.optim.AdamW, functools.partial(torch.optim.SGD, momentum=0.9)


@pytest.mark.parametrize(
    ("kind", "path", "value", "words"),
    [
        (ADAM, "net", GONE, "no 'net'"),
        (ADAM, "net", [1], "net = a list, not a dict"),
        (ADAM, "net/0.bias", GONE, r"no 'net\.0\.bias'"),
        (ADAM, "net/2.bias", NAN, r"an unknown 'net\.2\.bias'"),
        (
            ADAM,
            "net/0.weight",
            torch.Tensor.half,
            r"net\.0\.weight = float16 .* not float32 of shape \(3, 2\)",
        ),
        (ADAM, "net/0.weight", torch.Tensor.t, r"net\.0\.weight = float32 of shape \(2, 3\)"),
        (ADAM, "net/0.bias", torch.zeros(1).expand(3), r"net\.0\.bias = .* repeats a few"),
        (ADAM, "net/0.weight", torch.Tensor.to_sparse, r"net\.0\.weight = .* not a dense array"),
        (ADAM, "net/0.bias", torch.empty(3, device="meta"), r"net\.0\.bias = .* not a dense array"),
        (ADAM, "net/0.bias", NAN, r"net\.0\.bias = .* NaN or infinity"),
        (ADAM, "net/0.bias", 1.5, r"net\.0\.bias = 1\.5, not float32 of shape \(3\)"),
        (ADAM, "optimizer/state/0/exp_avg", GONE, r"no 'optimizer\.state\.0\.exp_avg'"),
        (ADAM, "optimizer/state/1/exp_avg_sq", NAN, r"state\.1\.exp_avg_sq = .* NaN"),
        (ADAM, "optimizer/state/1/step", torch.tensor(-7.0), r"state\.1\.step = .* not of values from 0"),
        (ADAM, "optimizer/state/9", {}, r"a key of optimizer\.state = 9, not an integer from 0 to 3"),
        (Lars, "optimizer/state/0/velocity", torch.zeros(2), r"velocity = .* not float32 of shape \(3, 2\)"),
        (SGD, "optimizer/state/0", {}, r"no 'optimizer\.state\.0\.momentum_buffer'"),
        (ADAM, "optimizer/param_groups", [], r"length of optimizer\.param_groups = 0, not 1"),
        (ADAM, "optimizer/param_groups/0/lr", "0.1", r"param_groups\[0\]\.lr = '0\.1', not a number"),
        (ADAM, "optimizer/param_groups/0/params", [0], r"params = a list, not the numbers of 4 parameters"),
        (ADAM, "scaler/scale", float("nan"), r"scaler\.scale = nan, not a finite number of at least 0"),
        (ADAM, "regions", None, "regions = None, not a dict"),
        (ADAM, "regions/weights", np.zeros((3, 1), np.float32), r"regions\.weights = .* of shape \(4, 1\)"),
        (ADAM, "regions/boxes", np.full((4, 1, 4), 0.5), r"wrong regions\.boxes: Row 0 .* empty"),
        (ADAM, "regions/epoch", 10**30, r"regions\.epoch = 10{30}, not an integer"),
        (ADAM, "maps/maps", GONE, r"no 'maps\.maps'"),
        (ADAM, "maps/maps", torch.zeros(4, 3, 3).half(), r"maps\.maps = .* not float16 of shape \(4, 2, 2\)"),
        (ADAM, "maps/fresh", "text", r"maps\.fresh = 'text', not bool of shape \(4\)"),
        (ADAM, "step", -7, "step = -7, not an integer from 0 to 9"),
        (ADAM, "step", 10**12, "step = 1000000000000, not an integer from 0 to 9"),
        (ADAM, "step", True, "step = True, not an integer"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_a_sentence_and_nothing_is_restored(
    kind: Callable[..., torch.optim.Optimizer], path: str, value: Any, words: str
) -> None:
    saved = {**states(parts(kind, 2)), "step": 2}
    own, steps = parts(kind, 1), {"step": whole(0, 9)}
    before = flat(states(own))
    error = FloatingPointError if value is NAN and "unknown" not in words else ValueError
    with pytest.raises(error, match=f"^the checkpoint has .*{words}.*; .* begin (it )?again") as refused:
        restore(changed(copy.deepcopy(saved), path, value), own, steps)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    assert flat(states(own)) == before
    restore(saved, own, steps)
    assert flat(states(own)) == flat({name: saved[name] for name in own})


def test_entries_that_contradict_each_other_are_found_before_anything_is_restored() -> None:
    saved, own = {**states(parts(ADAM, 2)), "step": 2}, parts(ADAM, 1)
    before = flat(states(own))

    def agree(found: dict[str, Any]) -> None:
        raise ValueError(f"step is {found['step']}")

    with pytest.raises(ValueError, match="step is 2"):
        restore(saved, own, {"step": whole(0, 9)}, agree)
    assert flat(states(own)) == before


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
