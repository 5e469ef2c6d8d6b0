"""RegionTable: what update takes and refuses, snapshots, files that survive kill -9."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dali_views.regions import RegionTable, Snapshot
from dali_views.regions import table as regions_module

COLUMNS = ("boxes", "weights", "partner", "written", "writes", "written_epoch")
BOX = [0.25, 0.125, 0.75, 0.5]


def same(a: RegionTable, b: RegionTable) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)


def filled(length: int = 6, regions: int = 1, fingerprint: str = "") -> RegionTable:
    table = RegionTable(length, regions, fingerprint)
    table.epoch = 3
    table.update([4, 1], [BOX, [0, 0, 0.5, 0.5]], [0.5, 2], [0, 5])
    return table


# ---- update


def test_a_new_table_says_whole_image_weight_one_and_oneself_as_partner() -> None:
    table = RegionTable(3, regions=2)
    assert table.boxes.tolist() == [[[0, 0, 1, 1]] * 2] * 3
    assert table.weights.tolist() == [[1, 1]] * 3
    assert table.partner.tolist() == [0, 1, 2]
    assert table.writes.tolist() == [0, 0, 0]
    assert table.written_epoch.tolist() == [-1, -1, -1]
    assert not table.written.any()
    for length, regions in ((-1, 1), (4, 0)):
        with pytest.raises(ValueError, match="cannot be"):
            RegionTable(length, regions)
    dtypes = [getattr(table, name).dtype for name in COLUMNS]
    assert dtypes == [np.float32, np.float32, np.int64, np.bool_, np.int32, np.int32]


def test_update_writes_the_named_rows_and_no_other() -> None:
    table = filled()
    assert table.boxes[4, 0].tolist() == BOX
    assert table.weights[:, 0].tolist() == [1, 2, 1, 1, 0.5, 1]
    assert table.partner.tolist() == [0, 5, 2, 3, 0, 5]
    assert table.writes.tolist() == [0, 1, 0, 0, 1, 0]
    assert table.written_epoch.tolist() == [-1, 3, -1, -1, 3, -1]
    assert table.boxes[[0, 2, 3, 5]].tolist() == [[[0, 0, 1, 1]]] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32, torch.uint8])
def test_torch_tensors_of_any_type_write_what_numpy_writes(
    dtype: torch.dtype, index_dtype: torch.dtype
) -> None:
    table = RegionTable(6)
    table.epoch = 3
    table.update(
        torch.tensor([4, 1], dtype=index_dtype),
        torch.tensor([BOX, [0, 0, 0.5, 0.5]], dtype=dtype, requires_grad=True),
        torch.tensor([0.5, 2], dtype=dtype)[:, None],
        partner=torch.tensor([0, 5], dtype=index_dtype),
    )
    assert same(table, filled())


def test_only_the_columns_given_change_and_only_boxes_make_a_row_written() -> None:
    table = RegionTable(3)
    table.update([1], partner=[2])
    table.update([0], weights=[0.0])  # a single region may weigh nothing
    assert table.boxes.tolist() == [[[0, 0, 1, 1]]] * 3
    assert table.weights.tolist() == [[0], [1], [1]]
    assert table.writes.tolist() == [1, 1, 0]
    assert not table.written.any()
    table.update([2], boxes=[[0, 0, 1, 1]])
    assert table.written.tolist() == [False, False, True]


def test_of_a_sample_given_twice_the_last_values_stay_and_count_once() -> None:
    table = RegionTable(3)
    table.update([2, 0, 2], [[0, 0, 0.1, 0.1], BOX, BOX], [7, 1, 3])
    assert table.boxes[2, 0].tolist() == BOX
    assert table.weights[2, 0] == 3
    assert table.writes.tolist() == [1, 0, 1]


def test_with_several_regions_one_box_or_weight_per_sample_goes_to_each_region() -> None:
    table = RegionTable(4, regions=2)
    table.update([3], [BOX], [5])
    assert table.boxes[3].tolist() == [BOX, BOX]
    assert table.weights[3].tolist() == [5, 5]
    table.update([3], [[BOX, [0, 0, 1, 0.5]]], [[0, 2]])
    assert table.boxes[3].tolist() == [BOX, [0, 0, 1, 0.5]]
    assert table.weights[3].tolist() == [0, 2]


def test_rounding_outside_the_image_is_clipped_and_an_empty_batch_is_no_write() -> None:
    table = RegionTable(1)
    table.update([0], np.array([[-1e-6, -5e-7, 1 + 1e-6, 1 + 5e-7]]))
    table.update(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    table.update([], weights=[])
    assert table.boxes[0, 0].tolist() == [0, 0, 1, 1]
    assert table.writes.tolist() == [1]


NAN, INF = float("nan"), float("inf")
WHOLE = [0, 0, 1, 1]
AT = [0, 2, 5]


@pytest.mark.parametrize(
    ("index", "options", "message"),
    [
        (AT, {"boxes": [WHOLE, [0, NAN, 1, 1], WHOLE]}, r"Row 2 \(position 1\) has a box with NaN"),
        (AT, {"boxes": [WHOLE, WHOLE, [0, 0, INF, 1]]}, r"Row 5 \(position 2\) has a box with NaN or inf"),
        (AT, {"boxes": [WHOLE, [0, 0, 1.00001, 1], [0, 0, 2, 1]]}, r"Row 2 .* outside \[0, 1\]: .*1.00001"),
        (AT, {"boxes": [WHOLE, WHOLE, [-0.1, 0, 1, 1]]}, "Row 5 .* outside"),
        (AT, {"boxes": [WHOLE, [0.5, 0, 0.4, 1], WHOLE]}, "Row 2 .* inverted or empty"),
        (AT, {"boxes": [WHOLE, [0, 0.5, 1, 0.5], WHOLE]}, "Row 2 .* inverted or empty"),
        (AT, {"boxes": [WHOLE, [0, 0.5, 1, 0.5 + 1e-12], WHOLE]}, "Row 2 .* inverted or empty"),
        (AT, {"boxes": [WHOLE, [1, 0, 1 + 1e-6, 1], WHOLE]}, "Row 2 .* inverted or empty"),
        (AT, {"weights": [1, 1, -0.5]}, r"Row 5 \(position 2\) has a negative weight: \[-0.5, -0.5\]"),
        (AT, {"weights": [1, NAN, 1]}, "Row 2 .* weight that is NaN or infinite"),
        (AT, {"weights": [1, 1e300, 1]}, "Row 2 .* weight that is NaN or infinite"),
        (AT, {"weights": [[1, 0], [0, 0], [0, 1]]}, "Row 2 .* only zero weights"),
        ([0, 2, 6], {"weights": [1, 1, 1]}, r"Row 6 \(position 2\) is not in the table of 6 rows"),
        ([-1, 2, 5], {"weights": [1, 1, 1]}, "Row -1 .* is not in the table"),
        (AT, {"partner": [1, 6, 9]}, "Row 2 .* has a partner that is not in the table of 6 rows: 6"),
        (AT, {"partner": [1, 1, -1]}, "Row 5 .* has a partner .*: -1"),
        (AT, {"partner": [1, 1]}, r"partner has shape \(2,\); give \(3,\)"),
        (AT, {"boxes": [WHOLE] * 2}, r"boxes has shape \(2, 4\); give \(3, 2, 4\) or \(3, 4\)"),
        (AT, {"boxes": np.ones((3, 3, 4))}, r"boxes has shape \(3, 3, 4\)"),
        (AT, {"weights": np.ones((3, 1))}, r"weights has shape \(3, 1\); give \(3, 2\) or \(3,\)"),
        ([[0], [2]], {"weights": [1, 1]}, r"index has shape \(2, 1\)"),
        (3, {"weights": 1}, r"index has shape \(\)"),
        (AT, {}, "nothing to write"),
        ([0.0, 1.0], {"weights": [1, 1]}, "index holds float64 values; give integers"),
        ([True, False], {"weights": [1, 1]}, "index holds bool"),
        (AT, {"partner": torch.tensor([0.5, 1, 1])}, "partner holds float32"),
        (AT, {"boxes": [["a"] * 4] * 3}, "boxes holds <U1 values; give numbers"),
    ],
)
def test_wrong_calls_are_refused_by_row_and_nothing_is_written(
    index: Any, options: dict[str, Any], message: str
) -> None:
    table = filled(regions=2)
    good: dict[str, Any] = {"boxes": [BOX] * 3, "weights": [9] * 3, "partner": [3] * 3} if options else {}
    with pytest.raises((ValueError, TypeError), match=message):
        table.update(index, **(good | options))
    assert same(table, filled(regions=2))


# ---- snapshots and state


def test_later_updates_do_not_reach_a_snapshot() -> None:
    table = filled()
    frozen = table.snapshot()
    table.epoch = 9
    table.update([4], [WHOLE], [1], [4])
    assert frozen.boxes[4, 0].tolist() == BOX
    assert (frozen.weights[4, 0], frozen.partner[4], frozen.epoch, len(frozen)) == (0.5, 0, 3, 6)
    assert frozen.written.tolist() == [False, True, False, False, True, False]


def as_tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}


def test_states_survive_a_checkpoint_that_holds_weights_only(tmp_path: Path) -> None:
    table = filled(regions=2, fingerprint="abc")
    parts = {"table": as_tensors(table.state_dict()), "frozen": as_tensors(table.snapshot().state_dict())}
    torch.save(parts, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other = RegionTable(6, regions=2)
    other.load_state_dict(loaded["table"])
    assert same(other, table)
    assert (other.epoch, other.fingerprint) == (3, "abc")
    frozen = Snapshot.from_state_dict(loaded["frozen"])
    assert frozen.epoch == 3
    assert not frozen.boxes.flags.writeable
    for name in ("boxes", "weights", "partner", "written"):
        assert np.array_equal(getattr(frozen, name), getattr(table, name))


def test_a_state_dict_is_a_copy_and_loading_takes_one() -> None:
    table, other = filled(), RegionTable(6)
    state = table.state_dict()
    other.load_state_dict(state)
    state["boxes"][:] = 0
    assert same(table, filled())
    assert same(other, filled())


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        (RegionTable(6, fingerprint="other"), {}, r"another data set \(fingerprint abc, not other\)"),
        (RegionTable(7), {}, "do not fit 7 rows of 1 regions"),
        (RegionTable(6, regions=2), {}, "do not fit 6 rows of 2 regions"),
        (RegionTable(6), {"boxes": np.full((6, 1, 4), 0.5)}, "Row 0 .* inverted or empty"),
        (RegionTable(6), {"writes": np.zeros(5, np.int32)}, "do not fit 6 rows"),
        (RegionTable(6), {"partner": None}, "The state has no 'partner'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_written(
    table: RegionTable, change: dict[str, Any], message: str
) -> None:
    state = {k: v for k, v in (filled(fingerprint="abc").state_dict() | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        table.load_state_dict(state)
    assert same(table, RegionTable(len(table), table.regions))


def test_binding_sets_an_empty_fingerprint_and_refuses_another() -> None:
    table = RegionTable(2)
    table.bind("abc")
    table.bind("abc")
    assert table.fingerprint == "abc"
    with pytest.raises(ValueError, match="another data set"):
        table.bind("other")


# ---- memory


def test_a_snapshot_copies_nothing_and_a_write_after_it_only_the_columns_written() -> None:
    table = filled()
    frozen, again = table.snapshot(), table.snapshot()
    for name in ("boxes", "weights", "partner", "written"):
        assert np.shares_memory(getattr(table, name), getattr(frozen, name))
        assert np.shares_memory(getattr(again, name), getattr(frozen, name))
    table.update([0], partner=[1])
    for name in ("boxes", "weights", "partner", "written"):
        assert np.shares_memory(getattr(table, name), getattr(frozen, name)) == (name != "partner")
    assert frozen.partner[0] == 0
    own = table.partner
    table.update([2], partner=[1])
    assert np.shares_memory(table.partner, own)


def test_a_table_that_nobody_has_written_takes_memory_for_partners_and_counts_alone() -> None:
    tracemalloc.start()
    try:
        tables = [RegionTable(1_000_000, regions=3) for _ in range(2)]
        frozen = [table.snapshot() for table in tables]
        bytes_per_row = tracemalloc.get_traced_memory()[1] / 2e6
    finally:
        tracemalloc.stop()
    assert bytes_per_row < 8 + 4 + 0.1
    assert frozen[0].boxes.nbytes == 48e6


@pytest.mark.parametrize("name", COLUMNS)
def test_what_is_read_of_a_table_or_a_snapshot_cannot_be_written(name: str) -> None:
    table = filled()
    for array in [getattr(table, name), getattr(table.snapshot(), name, getattr(table, name))]:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


# ---- files


def test_a_saved_table_loads_equal_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "regions.safetensors"
    filled(regions=3, fingerprint="abc").save(path)
    filled(regions=2, fingerprint="abc").save(path)
    for fingerprint in ("", "abc"):
        table = RegionTable.load(path, fingerprint)
        assert same(table, filled(regions=2))
        assert (table.epoch, table.fingerprint) == (3, "abc")
    assert [p.name for p in path.parent.iterdir()] == ["regions.safetensors"]
    with pytest.raises(ValueError, match=r"regions\.safetensors was made for another data set"):
        RegionTable.load(path, "other")
    with pytest.raises(FileNotFoundError, match=r"no region table at .*none"):
        RegionTable.load(tmp_path / "none")


def test_a_cut_file_and_a_file_of_another_kind_are_refused_and_a_flipped_bit_too(tmp_path: Path) -> None:
    path = tmp_path / "r"
    filled(40).save(path)
    data = path.read_bytes()
    np.save(tmp_path / "trap.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    others = [b"hello", (tmp_path / "trap.npy").read_bytes()]
    for content in [*others, *(data[:end] for end in range(0, len(data), 101))]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"r is not a readable region table .*; delete it"):
            RegionTable.load(path)
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :])
        with pytest.raises(ValueError, match="region table"):
            RegionTable.load(path)


# A bare package in place of dali_views/__init__.py: the writer needs NumPy only, which keeps its start short.
WRITER = """
import itertools, os, signal, sys, types
import numpy as np
sys.modules["dali_views"] = package = types.ModuleType("dali_views")
package.__path__ = [os.path.dirname(os.path.dirname(sys.argv[1]))]
from dali_views.regions import table as module
table = module.RegionTable(int(sys.argv[3]))

def save(n):
    table.epoch = n
    table.update(np.arange(len(table)), weights=np.full(len(table), n))
    table.save(sys.argv[2])
"""

# Forks at every 9th call made by a save a process that is killed there.
DIE_AT_EVERY_STEP = """
def die_at(step):
    calls = itertools.count()
    return lambda *_: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == step else None

save(1)
for step in itertools.count(0, 9):
    child = os.fork()
    if child == 0:
        sys.setprofile(die_at(step))
        save(2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = module.RegionTable.load(sys.argv[2])
    assert (found.weights == found.epoch).all(), step
    print(found.epoch, flush=True)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    save(1)
"""


def test_a_save_killed_at_any_step_leaves_the_old_or_the_new_table(tmp_path: Path) -> None:
    script = WRITER + DIE_AT_EVERY_STEP
    command = [sys.executable, "-c", script, regions_module.__file__, str(tmp_path / "regions"), "2000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    epochs = [int(line) for line in done.stdout.split()]
    assert len(epochs) > 20
    assert epochs == sorted(epochs)  # the old one up to the rename, the new one from then on
    assert set(epochs) == {1, 2}


def test_a_subset_keeps_boxes_weights_and_whether_they_were_written() -> None:
    table = RegionTable(6, regions=2)
    boxes = np.random.default_rng(0).uniform(0, 0.4, (2, 2, 4)) + np.array([0, 0, 0.5, 0.5])
    table.update([4, 1], boxes, [[0.5, 2.0], [1.0, 0.0]], partner=[0, 5])
    part = table.subset(np.array([4, 0, 1]))
    assert np.array_equal(part.written, [True, False, True])
    assert np.allclose(part.boxes[[0, 2]], boxes)
    assert np.array_equal(part.boxes[1], [[0, 0, 1, 1]] * 2)
    assert np.array_equal(part.weights, [[0.5, 2.0], [1.0, 1.0], [1.0, 0.0]])
    assert np.array_equal(part.partner, [0, 1, 2])
    part.update([1], boxes[:1])
    assert not table.written[0]
    assert part.state_dict()["written_epoch"].tolist() == [-1, 0, -1]
    mask = table.subset([False, True, False, False, True, False])
    assert np.array_equal(mask.weights, [[1.0, 0.0], [0.5, 2.0]])
    assert len(table.subset([])) == 0
    for rows, error in (([6], IndexError), ([True], IndexError), ([[0]], ValueError)):
        with pytest.raises(error):
            table.subset(rows)
