"""Region tables of several ranks: made equal by sync, compared, refused if they do not belong together."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from dali_views import RegionTable, SampleIndex, View, ViewLoader
from dali_views.regions import sync
from dali_views.regions.rows import COLUMNS
from trainers import config as cfg
from trainers.guides import Guide
from trainers.guides.semantic_pairs import SemanticPairs

HALF = [0.0, 0.0, 0.5, 0.5]


def test_without_other_ranks_sync_moves_nothing() -> None:
    table = RegionTable(3)
    table.update([1], [HALF])
    assert table.sync() == 0
    assert table.writes.tolist() == [0, 1, 0]


def sync_on_rank(rank: int, folder: str) -> None:
    for world in (4, 2):  # the last two ranks are done after the first world
        if rank < world:
            sync_in_world(rank, world, f"{folder}/{world}-")


def sync_in_world(rank: int, world: int, prefix: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{prefix}store", rank=rank, world_size=world)
    sync._ROUND = 8  # several rounds on a small table
    table = RegionTable(30, regions=2, fingerprint="abc")
    received = []
    state = table.state_dict()
    state["weights"][28] = rank + 5  # not an update: must stay where it is
    table.load_state_dict(state)
    # Round one: own rows rank, rank + world, ... below 20, and row 25 on every rank, twice on the first.
    table.epoch = 1
    own = np.arange(rank, 20, world)
    table.update(own, np.tile([0, 0, 0.5, (rank + 1) / 8], (len(own), 1)), own + 1, own + 2)
    for _ in range(2 if rank == 0 else 1):
        table.update([25], [[0, 0, 1, (rank + 1) / 8]], [rank + 1], [rank])
    with pytest.raises(ValueError, match=r"differ from rank 0's in boxes.*; call sync\(\)"):
        table.check_equal()
    received.append(table.sync())
    received.append(table.sync())
    # Round two: only the last rank has news.
    table.epoch = 2
    if rank == world - 1:
        table.update([3, 29], weights=[[0, 5], [7, 7]])
    received.append(table.sync())
    assert table.traffic.rows == sum(received)
    np.savez(f"{prefix}rank{rank}.npz", received=received, **table.state_dict())
    refused = ""
    try:
        RegionTable(30 if rank else 31).sync()
    except ValueError as error:
        refused = str(error)
    Path(f"{prefix}refused{rank}").write_text(refused)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(sync_on_rank, args=(str(folder),), nprocs=4, start_method="forkserver")  # type: ignore[no-untyped-call]
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_sync_makes_ranks_equal_moves_only_changed_rows_and_refuses_tables_of_other_shapes(
    synced: Path, world: int
) -> None:
    ranks = [dict(np.load(synced / f"{world}-rank{rank}.npz")) for rank in range(world)]
    own = 20 // world
    for rank, state in enumerate(ranks):
        news = 0 if rank == world - 1 else 2
        assert state["received"].tolist() == [(world - 1) * (own + 1), 0, news]
        assert state["weights"][28].tolist() == [rank + 5, rank + 5]
        state["weights"][28] = 1
        for name in COLUMNS:
            assert np.array_equal(state[name], ranks[0][name])
    table = RegionTable(30, regions=2)
    state = {name: ranks[0][name] for name in (*COLUMNS, "epoch")}
    table.load_state_dict({**state, "fingerprint": str(ranks[0]["fingerprint"])})
    rows = np.arange(20)
    assert np.array_equal(table.boxes[:20, 1, 3], (rows % world + 1) / 8)
    assert np.array_equal(table.partner[:20], rows + 2)
    assert table.weights[3].tolist() == [0, 5]
    assert table.boxes[25, 0, 3] == world / 8  # the highest rank wins
    assert table.partner[25] == world - 1
    assert table.writes[25] == world + 1  # writes add up
    assert table.writes[[3, 4, 24, 29]].tolist() == [2, 1, 0, 1]
    assert table.written_epoch[[3, 4, 24, 29]].tolist() == [2, 1, -1, 2]
    assert table.written.nonzero()[0].tolist() == [*range(20), 25]
    for rank in range(world):
        assert "ranks hold different RegionTables" in (synced / f"{world}-refused{rank}").read_text()


class Halves(Guide):
    """Writes a box for each of its rank's samples."""

    def after_epoch(self, regions: RegionTable, epoch: int, epochs: int) -> bool:
        rows = np.arange(dist.get_rank(), len(regions), 2)
        regions.update(rows, [HALF] * len(rows))
        regions.sync()
        return True


def pair(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    index = SampleIndex.from_arrays(np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 4)
    how = cfg.SemanticPairs(name="semantic_pairs", control="random", share=0.5)
    setting = SimpleNamespace(seed=0, device=torch.device("cpu"))
    training = SimpleNamespace(index=index, setting=setting, out=Path(folder))
    guide = SemanticPairs(how, training, Halves(None, training))  # type: ignore[arg-type]
    table = RegionTable(len(index))
    guide.begin(table)
    partners = [table.partner.copy()]
    for epoch in (1, 2):
        guide.after_epoch(table, epoch, 5)
        partners.append(table.partner.copy())
        table.check_equal()
        assert table.written.all()
        assert np.array_equal(table.boxes[:, 0], [HALF] * len(index))
    loader = ViewLoader(index, [View(size=8, crop="inside")], 4, regions=table, device="cpu")
    table.update([dist.get_rank()], weights=[2])
    with pytest.raises(ValueError, match=r"differ from rank 0's in weights; call sync\(\)"):
        loader.set_epoch(1)
    # Given by hand, rank and world are of this process alone, which waits for no other one.
    ViewLoader(index, loader.views, 4, regions=table, device="cpu", rank=rank, world=2).set_epoch(1 + rank)
    table.sync()
    loader.set_epoch(1)
    assert all((one != other).any() for one, other in pairwise(partners))
    dist.destroy_process_group()


def test_partners_and_boxes_are_kept_together_and_an_epoch_needs_equal_tables(tmp_path: Path) -> None:
    start_processes(pair, args=(str(tmp_path),), nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
