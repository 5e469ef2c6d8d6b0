"""Region tables that ranks share: equal to private ones, held once, whole whoever is killed."""

from __future__ import annotations

import os
import resource
import signal
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from by_hand import finish, start
from torch.multiprocessing.spawn import start_processes

from dali_views import RegionTable, SampleIndex
from dali_views.regions import changes as region_changes
from dali_views.regions import shared_pages
from dali_views.regions import sync as region_sync
from dali_views.regions.columns import COLUMNS, FROZEN
from dali_views.regions.table import Regions
from dali_views.system.collective import all_gather
from trainers import config as cfg
from trainers.guides import Guide
from trainers.guides.semantic_pairs import SemanticPairs

ROWS = 500
BIG = 2_000_000
HALF = [0.0, 0.0, 0.5, 0.5]


def contents(table: RegionTable | Regions) -> dict[str, np.ndarray]:
    names = COLUMNS if isinstance(table, RegionTable) else FROZEN
    return {name: getattr(table, name).copy() for name in names}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(column, other[name]) for name, column in one.items())


def some_update(draw: np.random.Generator, regions: int) -> dict[str, torch.Tensor]:
    """Rows that may repeat, most of them within reach of the other ranks' draws, and a few of the columns."""
    count = int(draw.integers(0, 60))
    rows = np.where(draw.random(count) < 0.5, draw.integers(0, 20, count), draw.integers(0, ROWS, count))
    low = draw.uniform(0, 0.5, (count, regions, 2))
    columns = {
        "boxes": np.concatenate([low, low + 0.5], axis=2),
        "weights": draw.uniform(0.1, 1, (count, regions)),
        "partner": draw.integers(0, ROWS, count),
    }
    chosen = draw.permutation(list(columns))[: draw.integers(1, 4)]
    return {"index": torch.from_numpy(rows)} | {name: torch.from_numpy(columns[name]) for name in chosen}


def moves_as_a_private_one(rank: int, regions: int) -> None:
    draw = np.random.default_rng([rank, regions])
    private, shared = (RegionTable(ROWS, regions, "abc", shared=shared) for shared in (False, True))
    frozen: list[tuple[Regions, dict[str, np.ndarray]]] = []
    for epoch in range(6):
        if epoch == 3:
            shared.load_state_dict(private.state_dict())
        private.epoch = shared.epoch = epoch
        before = contents(shared)
        frozen.append((shared.snapshot(), contents(shared.snapshot())))
        for number in range(int(draw.integers(0, 6))):
            update = some_update(draw, regions)
            private.update(**update)
            if number % 2:
                shared._queue.add(update, epoch)  # as if it came from a GPU
            else:
                shared.update(**update)
        assert same(contents(shared), before)
        assert private.sync() == shared.sync()
        assert same(contents(private), contents(shared))
        shared.check_equal()
    assert (private.traffic.rows, private.traffic.bytes) == (shared.traffic.rows, shared.traffic.bytes)
    assert shared.writes.max() > 1
    assert all(same(contents(snapshot), then) for snapshot, then in frozen)
    rows = np.array([3, 1])
    assert same(contents(private.subset(rows)), contents(shared.subset(rows)))


def refuses_on_all_ranks_or_none(rank: int) -> None:
    with pytest.raises(ValueError, match="ranks hold different RegionTables"):
        RegionTable(30 if rank else 31, shared=True)
    table = RegionTable(50_000, shared=True)
    table.update([rank], [HALF])
    assert table.sync() == dist.get_world_size() - 1
    before = contents(table)
    # One rank writes what it does not synchronise.
    if rank == 1:
        table.update([3], [HALF])
    with pytest.raises(ValueError, match=r"what ranks \[1\] wrote .* call sync"):
        table.check_equal()
    table.load_state_dict(table.state_dict())
    table.check_equal()
    # One rank finds a state wanting.
    state = table.state_dict()
    if rank == 1:
        state["weights"][7] = -1
    error, message = (ValueError, "^Row 7") if rank == 1 else (RuntimeError, "^Rank 1 failed: .*Row 7")
    with pytest.raises(error, match=message):
        table.load_state_dict(state)
    assert same(contents(table), before)
    # The rank that makes the next version has no memory for it.
    table.update([10 + rank], [HALF])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    error, message = (OSError, "") if rank == 0 else (RuntimeError, "^Rank 0 failed: OSError: .*")
    with pytest.raises(error, match=message + "there is no memory for 800000 bytes"):
        table.sync()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(contents(table), before)
    table.sync()
    assert table.writes.nonzero()[0].tolist() == [
        first + n for first in (0, 10) for n in range(dist.get_world_size())
    ]


def wrote_files(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: a path that is opened to be written is a file that a kill could leave behind."""
    if event == "open" and isinstance(arguments[0], str):
        assert not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT), arguments


def share(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/{world}", rank=rank, world_size=world)
    region_sync._SYNC_ROWS, region_changes._FEWEST = 64, 20  # several rounds, and sorts between updates
    sys.addaudithook(wrote_files)
    for regions in (1, 3):
        moves_as_a_private_one(rank, regions)
    refuses_on_all_ranks_or_none(rank)
    if world == 3:  # the last rank sees no other's processes, as in a container or on a machine of its own
        reaches = shared_pages._reaches
        shared_pages._reaches = lambda process, *rest: (
            reaches(process, *rest) and (rank < 2 or process == os.getpid())
        )
        moves_as_a_private_one(rank, 3)
        leads = all_gather(np.array([RegionTable(9, shared=True)._rows._pages.leads]))
        assert np.concatenate(leads).tolist() == [True, False, True]
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_shared_tables_are_at_every_sync_what_private_ones_are_and_fail_together(
    world: int, tmp_path: Path
) -> None:
    """Of random updates with conflicts; no file is ever written, and what was frozen stays as it was."""
    start_processes(share, args=(world, str(tmp_path)), nprocs=world, start_method="forkserver")  # type: ignore[no-untyped-call]


# ---- memory


def memory() -> int:
    """Bytes of this process; of pages that several have, its share of them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def hold(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    taken = {}
    for shared in (True, False):
        before = memory()
        table = RegionTable(BIG, shared=shared)
        table.update([rank], [HALF], [0.5], [7])
        table.sync()
        frozen = table.snapshot()
        table.check_equal()  # reads every page, as an epoch does
        assert frozen.written.sum() == 2
        dist.barrier()
        taken[shared] = memory() - before
        dist.barrier()
        del table, frozen
    np.save(f"{folder}/{rank}.npy", [taken[False], taken[True]])
    dist.destroy_process_group()


def test_two_ranks_hold_one_shared_table_and_two_private_ones(tmp_path: Path) -> None:
    start_processes(hold, args=(str(tmp_path),), nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
    private, shared = sum(np.load(tmp_path / f"{rank}.npy") for rank in range(2))
    one = sum(column.nbytes for column in contents(RegionTable(BIG)).values())
    assert 0.9 * one < shared < 1.4 * one
    assert private > 1.8 * one


# ---- a rank that is killed


def killed_while(rank: int, folder: str, victim: int, where: tuple[str, str]) -> int:
    """Ranks one of which is killed where it enters a function in `sync`: what is left to the other?"""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    table = RegionTable(1000, shared=True)
    table.update([rank], [HALF])
    table.sync()
    before, frozen = contents(table), table.snapshot()
    then = contents(frozen)
    table.update([5 + rank], [HALF], partner=[rank])

    def die(frame: types.FrameType, event: str, _: object) -> None:
        file = Path(frame.f_code.co_filename).name
        if (event, file, frame.f_code.co_name) == ("call", *where):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(wrote_files)
    if rank == victim:
        sys.setprofile(die)
    with pytest.raises(RuntimeError):
        table.sync()
    assert same(contents(table), before)
    assert same(contents(frozen), then)
    return 0


@pytest.mark.parametrize(
    ("victim", "file", "function"),
    [
        (0, "sync.py", "_settled"),
        (0, "shared_pages.py", "__init__"),  # of a draft
        (0, "shared_pages.py", "_mapped"),
        (0, "shared_pages.py", "publish"),
        (1, "shared_pages.py", "_mapped"),
        (1, "collective.py", "raise_together"),
    ],
)
def test_of_a_rank_killed_in_mid_sync_no_file_is_left_and_the_others_keep_the_table_before(
    victim: int, file: str, function: str, tmp_path: Path
) -> None:
    ranks = start(2, tmp_path, killed_while, lambda rank: (rank, str(tmp_path), victim, (file, function)))
    codes = finish(ranks)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 0, (tmp_path / f"{1 - victim}.log").read_text()


# ---- guides


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
    config = types.SimpleNamespace(run=types.SimpleNamespace(seed=0, out=folder))
    for shared in (False, True):
        guide = SemanticPairs(config, how, Halves(), index, torch.device("cpu"))  # type: ignore[arg-type]
        table = RegionTable(len(index), shared=shared)
        guide.begin(table)
        partners = [table.partner.copy()]
        for epoch in (1, 2):
            guide.after_epoch(table, epoch, 5)
            partners.append(table.partner.copy())
            table.check_equal()
            assert table.written.all()
            assert np.array_equal(table.boxes[:, 0], [HALF] * len(index))
        assert all((one != other).any() for one, other in pairwise(partners))
    dist.destroy_process_group()


def test_partners_and_the_boxes_of_all_ranks_stand_beside_each_other(tmp_path: Path) -> None:
    start_processes(pair, args=(str(tmp_path),), nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
