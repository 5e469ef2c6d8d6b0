"""Updates that come from a GPU: nobody waits for them, and the table ends as if they came from the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_regions import same

from dali_views import RegionTable


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
def test_updates_from_a_gpu_wait_for_nothing_and_end_as_those_from_the_cpu():
    steps, there, here = some_updates(50), RegionTable(100), RegionTable(100)
    on_gpu = [{name: value.cuda() for name, value in step.items()} for step in steps]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in on_gpu:
            there.update(**step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step in steps:
        here.update(**step)
    assert same(there, here)


@pytest.mark.gpu
def test_a_wrong_update_from_a_gpu_is_refused_when_the_table_is_read():
    table = RegionTable(4)
    table.update(torch.tensor([1]).cuda(), torch.tensor([[0.0, 0.0, 0.0, 1.0]]).cuda())
    with pytest.raises(ValueError, match="Row 1"):
        table.snapshot()
    assert not table.written.any()


@pytest.mark.parametrize("column", ["boxes", "weights", "partner", "written", "writes", "written_epoch"])
def test_reading_any_column_first_writes_what_is_queued(column):
    there, here = RegionTable(100), RegionTable(100)
    for step in some_updates(5):
        there._queue.add(step, there.epoch)
        here.update(**step)
    assert np.array_equal(getattr(there, column), getattr(here, column))
    assert not there._queue


def test_queued_updates_are_written_before_later_ones_and_under_their_own_epoch():
    table = RegionTable(4)
    queued(table, [1, 2], [2.0, 2.0])
    queued(table, [1, 2], [3.0, 3.0])
    table.epoch = 5
    table.update([2], weights=[4.0])
    assert table.weights[:, 0].tolist() == [1.0, 3.0, 4.0, 1.0]
    assert table.writes.tolist() == [0, 2, 3, 0]
    assert table.written_epoch.tolist() == [-1, 0, 5, -1]


def test_a_snapshot_a_file_and_a_state_hold_what_was_queued(tmp_path):
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
def test_the_caller_may_overwrite_values_on_the_cpu_and_give_values_with_a_gradient(kind):
    table = RegionTable(4)
    index, weights = kind([1, 2]), kind([2.0, 3.0])
    table._queue.add({"index": index, "weights": weights}, 0)
    index[0], weights[1] = 3, 9.0
    assert table.weights[:, 0].tolist() == [1.0, 2.0, 3.0, 1.0]
    table._queue.add({"index": torch.tensor([1]), "weights": 2 * torch.ones(1, requires_grad=True)}, 0)
    assert table.weights[1] == 2.0
