"""Two processes with half of the batch each, against one with the whole; and ranks that end together."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from by_hand import finish, start
from live_bytes import LiveBytes
from networks import SMALL, small_method, views_for, without_batch_norm
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from trainers.engine import ranks as distributed
from trainers.engine.optim import Clock
from trainers.evaluate import knn
from trainers.evaluate.knn import knn_accuracy, share
from trainers.methods import Method

WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.25], dtype=torch.float64)
STEPS = 2  # in the second one, what the first one left (queue, centre, momentum networks) has an effect


def learn(method: Method, rows: slice, call: Any) -> dict[str, Any]:
    """Losses and gradients of a few steps of plain gradient descent, in float64.

    Sharp softmaxes enlarge the rounding of float32 beyond any bound that would still show a fault.
    """
    found: dict[str, Any] = {"losses": [], "gradients": []}
    for step in range(STEPS):
        clock = Clock(step, STEPS, 1)
        method.before_step(clock)
        losses = call([view[rows].double() for view in views_for(method_name(method), 4, seed=step)])
        method.zero_grad()
        (WEIGHTS[rows] * losses).mean().backward()
        gradients = [p.grad.clone() for p in method.parameters() if p.grad is not None]
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
        method.after_step(clock)
        found["losses"].append(losses.detach())
        found["gradients"].append(gradients)
    found["buffers"] = {name: buffer.clone() for name, buffer in method.named_buffers()}
    return found


def method_name(method: Method) -> str:
    return type(method).__name__.lower()


def learn_on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, Any] = {"rows": distributed.gather_rows(torch.full((rank,), 7))}
    for name in SMALL:
        method = without_batch_norm(small_method(name)).double()
        parallel = DistributedDataParallel(method, broadcast_buffers=False)
        found[name] = learn(method, slice(2 * rank, 2 * rank + 2), parallel)
    found["mean"] = distributed.all_mean(torch.tensor(float(rank)))
    found["knn"] = knn_of(slice(rank, None, 2))
    found["memory"] = [memory_of_knn(slice(rank, None, 2), width) for width in WIDTHS]
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.cleanup()


class Samples:
    """In place of a loader: samples in batches, of which the last are shown again, on another rank."""

    batch_size = 8

    def __init__(self, seed: int, part: slice, count: int = 90, width: int = 6) -> None:
        self.rows = torch.cat([torch.arange(count), torch.arange(count - 11, count)])[part].split(8)
        draw = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(-1, 9, (count,), generator=draw)
        centres = torch.randn(9, width, generator=torch.Generator().manual_seed(0))
        self.features = centres[self.labels] + 1.2 * torch.randn(count, width, generator=draw)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[SimpleNamespace]:
        for rows in self.rows:
            yield SimpleNamespace(views=[self.features[rows]], label=self.labels[rows], index=rows)


def knn_of(part: slice) -> dict[str, Any]:
    """Scores of this rank's part of the samples, and how many of them have a label."""
    bank, tests = (share(torch.nn.Identity(), Samples(seed, part), "cpu") for seed in (1, 2))  # type: ignore[arg-type]
    counts = [int((labels >= 0).sum()) for _, labels in (bank, tests)]
    return {"scores": [knn_accuracy(*bank, *tests, k, chunk=7) for k in (1, 20, 999)], "counts": counts}


BANK, QUERIES, TILE = 8000, 400, 2**16
WIDTHS = (256, 16)  # the second is less than the number of queries that are compared at a time


def memory_of_knn(part: slice, width: int) -> list[int]:
    """Bytes that the features take at most while they are made, and then while they are compared."""
    samples = [Samples(seed, part, count, width) for seed, count in ((1, BANK), (2, QUERIES))]
    with patch.object(knn, "_TILE", TILE), LiveBytes() as live:
        bank, tests = (share(torch.nn.Identity(), each, "cpu") for each in samples)  # type: ignore[arg-type]
        made, live.peak = live.peak, live.now
        knn_accuracy(*bank, *tests, 20, chunk=64)
    return [made, live.peak]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(learn_on_one_rank, args=(str(folder),), nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", SMALL)
def test_two_ranks_have_the_losses_gradients_and_state_of_one_with_the_joined_batch(
    ranks: list[dict[str, Any]], name: str
) -> None:
    method = without_batch_norm(small_method(name)).double()
    alone = learn(method, slice(0, 4), method)
    for step in range(STEPS):
        joined = torch.cat([rank[name]["losses"][step] for rank in ranks])
        torch.testing.assert_close(joined, alone["losses"][step], atol=1e-12, rtol=1e-9)
        for rank in ranks:
            gradients: list[Tensor] = rank[name]["gradients"][step]
            torch.testing.assert_close(gradients, alone["gradients"][step], atol=1e-12, rtol=1e-9)
    assert not torch.allclose(alone["losses"][0], alone["losses"][1])
    for rank in ranks:
        torch.testing.assert_close(rank[name]["buffers"], alone["buffers"], atol=1e-12, rtol=1e-9)


def test_gathers_take_unequal_numbers_of_rows_and_means_are_over_ranks(ranks: list[dict[str, Any]]) -> None:
    assert [(rank["rows"].tolist(), rank["mean"].item()) for rank in ranks] == [([7], 0.5)] * 2


def test_ranks_that_share_the_bank_of_knn_find_what_one_finds_in_all_of_it(
    ranks: list[dict[str, Any]],
) -> None:
    alone, counts = knn_of(slice(None)), [rank["knn"]["counts"] for rank in ranks]
    assert [sum(each) for each in zip(*counts, strict=True)] == alone["counts"]
    assert 0 < counts[0][0] < alone["counts"][0]
    for rank in ranks:
        assert rank["knn"]["scores"] == alone["scores"]
    assert 0.2 < alone["scores"][1]["top1"] < 1


def test_knn_takes_the_memory_that_it_promises_however_wide_the_features(ranks: list[dict[str, Any]]) -> None:
    alone = [memory_of_knn(slice(None), width) for width in WIDTHS]
    for world, found in ((1, alone), (2, ranks[0]["memory"]), (2, ranks[1]["memory"])):
        for width, (made, compared) in zip(WIDTHS, found, strict=True):
            features = 2 * (BANK / world + QUERIES * (1 if world == 1 else 3)) * width
            bank = 2 * BANK / world * width
            assert bank < made < features + 80 * (BANK + QUERIES)  # for a moment, all ranks' rows lie there
            assert compared < features + 20 * (BANK + QUERIES) + 0.3e9 * TILE / 2**24


def test_without_a_process_group_everything_is_the_only_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.init("cpu") == torch.device("cpu")
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    x = torch.ones(2, requires_grad=True)
    assert distributed.gather_with_grad(x) is x
    assert not distributed.gather(x).requires_grad
    with pytest.raises(ValueError, match="should be gpu or cpu"):
        distributed.init("tpu")


def meet(rank: int, how: str, culprit: int) -> int:
    """Join the others, end as told if this is the rank at fault, else wait for it in a collective."""
    distributed.init("cpu")
    with distributed.together():
        match how if rank == culprit else "":
            case "death":
                os.kill(os.getpid(), signal.SIGKILL)
            case "error":
                raise ValueError(f"{rank} boxes are missing")
            case "errand":
                return 0
        if how != "errand":
            dist.all_reduce(torch.ones(1))
    return 0


@pytest.mark.parametrize("how", ["death", "error"])
@pytest.mark.parametrize("culprit", [0, 2])
def test_a_rank_that_is_killed_or_fails_ends_the_others(tmp_path: Path, how: str, culprit: int) -> None:
    codes = finish(start(3, tmp_path, meet, lambda rank: (rank, how, culprit)))
    assert codes.pop(culprit) == (-signal.SIGKILL if how == "death" else 1)
    assert codes == [1, 1]
    for rank in {0, 1, 2} - {culprit}:
        last = (tmp_path / f"{rank}.log").read_text().splitlines()[-1]
        assert last.startswith(
            f"ConnectionError: rank {rank} lost another rank, which has failed or was killed"
        )
    if how == "error":
        assert "2 boxes are missing".replace("2", str(culprit)) in (tmp_path / f"{culprit}.log").read_text()


def test_ranks_may_end_one_after_the_other(tmp_path: Path) -> None:
    assert finish(start(3, tmp_path, meet, lambda rank: (rank, "errand", 1))) == [0, 0, 0]
