"""RegionTable: what update takes and refuses, snapshots, files, and updates that come from a GPU."""

from __future__ import annotations

import copy
import pickle
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import without_waiting

from dali_views import RegionTable
from dali_views.regions.rows import COLUMNS, FROZEN

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
        with pytest.raises(ValueError, match="are no table"):
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


WHOLE = [0, 0, 1, 1]
AT = [0, 2, 5]


@pytest.mark.parametrize(
    ("index", "options", "message"),
    [
        (AT, {"boxes": [WHOLE, [0, float("nan"), 1, 1], WHOLE]}, r"Row 2 \(position 1\) has a box with NaN"),
        (AT, {"boxes": [WHOLE, [0, 0, 1.00001, 1], [0, 0, 2, 1]]}, r"Row 2 .* outside \[0, 1\]: .*1.00001"),
        (AT, {"boxes": [WHOLE, [0.5, 0, 0.4, 1], WHOLE]}, "Row 2 .* inverted or empty"),
        (AT, {"boxes": [WHOLE, [0, 0.5, 1, 0.5], WHOLE]}, "Row 2 .* inverted or empty"),
        (AT, {"boxes": [WHOLE, [1, 0, 1 + 1e-6, 1], WHOLE]}, "Row 2 .* inverted or empty"),
        (AT, {"weights": [1, 1, -0.5]}, r"Row 5 \(position 2\) has a negative weight: \[-0.5, -0.5\]"),
        (AT, {"weights": [1, 1e300, 1]}, "Row 2 .* weight that is NaN or infinite"),
        (AT, {"weights": [[1, 0], [0, 0], [0, 1]]}, "Row 2 .* only zero weights"),
        ([0, 2, 6], {"weights": [1, 1, 1]}, r"Row 6 \(position 2\) is not in the table of 6 rows"),
        ([-1, 2, 5], {"weights": [1, 1, 1]}, "Row -1 .* is not in the table"),
        (AT, {"partner": [1, 6, 9]}, "Row 2 .* has a partner that is not in the table of 6 rows: 6"),
        (AT, {"partner": [1, 1]}, r"partner has shape \(2,\); give \(3,\)"),
        (AT, {"boxes": [WHOLE] * 2}, r"boxes has shape \(2, 4\); give \(3, 2, 4\) or \(3, 4\)"),
        (AT, {"weights": np.ones((3, 1))}, r"weights has shape \(3, 1\); give \(3, 2\) or \(3,\)"),
        ([[0], [2]], {"weights": [1, 1]}, r"index has shape \(2, 1\)"),
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
        (RegionTable(7), {}, r"boxes = float32 of shape \(6, 1, 4\), not numbers of shape \(7, 1, 4\)"),
        (RegionTable(6, regions=2), {}, r"boxes = .* not numbers of shape \(6, 2, 4\)"),
        (RegionTable(6), {"boxes": np.full((6, 1, 4), 0.5)}, "Row 0 .* inverted or empty"),
        (
            RegionTable(6),
            {"writes": np.zeros(5, np.int32)},
            r"writes = int32 of shape \(5\), not numbers of shape \(6\)",
        ),
        (RegionTable(6), {"partner": None}, "The state of the region table has no 'partner'"),
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


# ---- threads and copies


def test_whatever_is_taken_of_a_table_has_all_rows_of_an_update_from_another_thread_or_none() -> None:
    """Each update writes one value to all rows; two values in one place are a part of an update."""
    length, done = 20_000, threading.Event()
    table, rows = RegionTable(length), np.arange(length)
    values = np.linspace(0.1, 0.9, 7, dtype=np.float32)
    table.update(rows, np.tile([0, 0, 1, values[0]], (length, 1)), np.full(length, values[0]))

    def writer() -> int:
        calls = 0
        while not done.is_set():
            value = values[calls % len(values)]
            boxes = torch.tensor([0, 0, 1, value]).expand(length, 4)
            table.update(rows, boxes, torch.full((length,), float(value)))
            calls += 1
        return calls

    def parts() -> Iterator[dict[str, np.ndarray]]:
        state = table.state_dict()
        yield state
        part = table.subset(rows)
        yield {"boxes": part.boxes, "weights": part.weights}
        yield vars(copy.copy(table))["_columns"]

    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(writer) for _ in range(2)]
        taken = []
        for _ in range(30):
            taken += [vars(table.snapshot()), *parts()]  # looked at in the end: a snapshot must not change
        done.set()
    written = 1 + sum(each.result() for each in writers)
    assert (table.writes == written).all(), "no write is lost"
    for part in taken:
        value = part["weights"][0, 0]
        assert (part["weights"] == value).all()
        assert (part["boxes"] == [0, 0, 1, value]).all()
        assert np.ptp(part.get("writes", 0)) == 0


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copy_of_a_table_is_a_table_of_its_own(copied: Callable[[RegionTable], RegionTable]) -> None:
    table = filled(fingerprint="abc")
    other = copied(table)
    assert same(table, other)
    assert (other.epoch, other.fingerprint) == (table.epoch, "abc")
    other.update([0], weights=[9.0])
    queued(other, [1], [9.0])
    assert other.weights[:2, 0].tolist() == [9.0, 9.0]
    assert same(table, filled(fingerprint="abc"))
    table.update([2], weights=[9.0])
    assert other.weights[2] != 9.0


# ---- memory


def test_a_snapshot_copies_nothing_and_a_write_after_it_only_the_columns_written() -> None:
    table = filled()
    frozen, again = table.snapshot(), table.snapshot()
    for name in FROZEN:
        assert np.shares_memory(getattr(table, name), getattr(frozen, name))
        assert np.shares_memory(getattr(again, name), getattr(frozen, name))
    table.update([0], partner=[1])
    for name in FROZEN:
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


# ---- updates from a GPU: nobody waits for them, and the table ends as if they came from the CPU


def some_updates(count: int, batch: int = 16, length: int = 100) -> list[dict[str, torch.Tensor]]:
    draw = np.random.default_rng(0)
    low = draw.uniform(0.0, 0.5, (count, batch, 2))
    arrays = {
        "index": draw.integers(0, length, (count, batch)),
        "boxes": np.concatenate([low, low + 0.5], axis=2).astype(np.float32),
        "weights": draw.uniform(0.1, 1.0, (count, batch)).astype(np.float32),
    }
    return [{name: torch.from_numpy(array[n]) for name, array in arrays.items()} for n in range(count)]


def queued(table: RegionTable, index: list[int], weights: list[float]) -> None:
    """An update through the queue for GPU tensors, here with tensors that have already arrived."""
    table._queue.add({"index": torch.tensor(index), "weights": torch.tensor(weights)}, table.epoch)


@pytest.mark.gpu
def test_updates_from_a_gpu_wait_for_nothing_and_end_as_those_from_the_cpu() -> None:
    steps, there, here = some_updates(50), RegionTable(100), RegionTable(100)
    on_gpu = [{name: value.cuda() for name, value in step.items()} for step in steps]
    with without_waiting("gpu"):
        for step in on_gpu:
            there.update(**step)
    for step in steps:
        here.update(**step)
    assert same(there, here)


@pytest.mark.gpu
def test_a_wrong_update_from_a_gpu_is_refused_when_the_table_is_read() -> None:
    table = RegionTable(4)
    table.update(torch.tensor([1]).cuda(), torch.tensor([[0.0, 0.0, 0.0, 1.0]]).cuda())
    with pytest.raises(ValueError, match="Row 1"):
        table.snapshot()
    assert not table.written.any()


@pytest.mark.parametrize("column", COLUMNS)
def test_reading_any_column_first_writes_what_is_queued(column: str) -> None:
    there, here = RegionTable(100), RegionTable(100)
    for step in some_updates(5):
        there._queue.add(step, there.epoch)
        here.update(**step)
    assert np.array_equal(getattr(there, column), getattr(here, column))
    assert not there._queue


def test_queued_updates_are_written_before_later_ones_and_under_their_own_epoch() -> None:
    table = RegionTable(4)
    queued(table, [1, 2], [2.0, 2.0])
    queued(table, [1, 2], [3.0, 3.0])
    table.epoch = 5
    table.update([2], weights=[4.0])
    assert table.weights[:, 0].tolist() == [1.0, 3.0, 4.0, 1.0]
    assert table.writes.tolist() == [0, 2, 3, 0]
    assert table.written_epoch.tolist() == [-1, 0, 5, -1]


def test_a_snapshot_a_file_and_a_state_hold_what_was_queued(tmp_path: Path) -> None:
    table = RegionTable(4)
    queued(table, [1], [2.0])
    assert table.snapshot().weights[1] == 2.0
    queued(table, [1], [3.0])
    table.save(tmp_path / "table")
    assert RegionTable.load(tmp_path / "table").weights[1] == 3.0
    queued(table, [1], [4.0])
    table.load_state_dict(RegionTable(4).state_dict())
    assert table.weights[1] == 1.0


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_the_caller_may_overwrite_values_on_the_cpu_and_give_values_with_a_gradient(kind: Any) -> None:
    table = RegionTable(4)
    index, weights = kind([1, 2]), kind([2.0, 3.0])
    table._queue.add({"index": index, "weights": weights}, 0)
    index[0], weights[1] = 3, 9.0
    assert table.weights[:, 0].tolist() == [1.0, 2.0, 3.0, 1.0]
    table._queue.add({"index": torch.tensor([1]), "weights": 2 * torch.ones(1, requires_grad=True)}, 0)
    assert table.weights[1] == 2.0
