"""What loading costs a training and in memory."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import get_model

from . import dataloaders as dl
from . import gpu_peers, published
from .contest import OF_TIME, Batches, Contender, Report, Row, Setup, figure, speed_row, take_turns
from .loaders import batches, endless, guided, loader_of, table_of_boxes

_SAMPLES = 50  # readings of a process's memory, evenly spread


class _Trainer:
    """A network in training, in mixed precision on a GPU: one call is one step.

    It is a torchvision ResNet with a contrastive loss, or `published.NAME`.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        recipe = name == published.NAME
        self.loss = published.loss if recipe else _contrast
        network: Any = published.network() if recipe else get_model(name, num_classes=128)
        self.model = network.to(device, memory_format=torch.channels_last)
        self.optimizer = (
            published.optimiser(self.model)
            if recipe
            else torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        )
        self._last: Any = None

    def __call__(self, views: list[Tensor]) -> None:
        """Forward, backward and update on the first two views (B, 3, S, S)."""
        kind = self.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            first, second = (self.model(view.to(self.device, non_blocking=True)) for view in views[:2])
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.loss(first, second))
        self.optimizer.step()
        if kind == "cuda":
            # A GPU may be one step behind, no more: otherwise steps would count that are only queued.
            if self._last is not None:
                self._last.synchronize()
            self._last = torch.cuda.current_stream().record_event()


def _contrast(first: Tensor, second: Tensor) -> Tensor:
    """SimCLR's loss in one direction, of embeddings (B, D)."""
    first, second = (F.normalize(each.float()) for each in (first, second))
    return F.cross_entropy(first @ second.T / 0.2, torch.arange(len(first), device=first.device))


def training(
    setup: Setup,
    name: str,
    rounds: int,
    seconds: float,
    report: Report = print,
    until: float = math.inf,
) -> list[Row]:
    """The model on one resident batch, the loader alone, both together with rows written back at every step.

    "Lost to loading" is what `both` falls short of `model alone`; a GPU that decodes loses the decoding, too.
    `published.NAME` has views of its own, and peers that feed it.
    """
    if len(setup.views) < 2:
        raise ValueError("Training compares two views of an image, and the recipe makes one; take another.")
    recipe = name == published.NAME
    if recipe:
        setup = replace(setup, views=published.views(setup.views[0].size))
    trainer = _Trainer(name, torch.device("cuda" if setup.device == "gpu" else "cpu"))
    views, table = guided(setup.views), table_of_boxes(setup)
    resident = next(iter(loader_of(setup, views, table)))
    shares: dict[str, list[float]] = {"host waiting for a batch": [], "updating rows": []}

    def alone() -> Batches:
        while True:
            trainer(resident.views)
            yield len(resident)

    def both() -> Batches:
        loader, updating, began = loader_of(setup, views, table), 0.0, time.perf_counter()
        try:
            for batch in endless(loader):
                trainer(batch.views)
                done = time.perf_counter()
                # As a step's own boxes and weights would be: on the model's device.
                table.update(batch.index, resident.boxes, resident.weights)
                updating += time.perf_counter() - done
                yield len(batch)
        finally:
            shares["host waiting for a batch"].append(loader.stats.wait_share)
            if (on_gpu := loader.stats.gpu_wait_share) is not None:
                shares.setdefault("GPU waiting for views", []).append(on_gpu)
            shares["updating rows"].append(updating / (time.perf_counter() - began))

    starts: dict[str, Callable[[], Batches]] = {
        f"{name}: model alone": alone,
        f"{name}: loader alone": partial(batches, setup, views, 1),
        f"{name}: both": both,
    }
    own = "views of its own" * recipe
    contenders = [Contender(key, "ours", setup.device, start, 2, own) for key, start in starts.items()]
    fed = {
        "torchvision in workers": partial(dl.batches, setup, dl.pil_image, dl.pil_view, trainer),
        "Kornia on the device": partial(gpu_peers.kornia, setup, trainer),
    }
    for key, start in fed.items() if recipe else ():
        note = f"published: {published.REPORTED[key]} images/s (one H200, 8 workers)"
        contenders.append(Contender(f"{name}: {key}", "peer", setup.device, start, 2, note))
    rates = take_turns(contenders, rounds, seconds, report=report, until=until)
    model, together = rates[f"{name}: model alone"], rates[f"{name}: both"]
    shares["lost to loading"] = [1.0 - slower / rate for rate, slower in zip(model, together, strict=True)]
    part = partial(figure, "training", kind="ours", device=setup.device)
    measured = [each for each in contenders if each.name in rates]
    rows = [speed_row("training", each, rates, contenders[0].name) for each in measured]
    return rows + [part(f"{name}: {key}", OF_TIME, share) for key, share in shares.items()]


def memory(setup: Setup, batches: int, batch_sizes: Sequence[int], report: Report = print) -> list[Row]:
    """Rows of peaks for some batch sizes and half and all threads, then of growth over `batches` batches."""
    runs = {
        f"batch {size}, {count} threads": (replace(setup, batch_size=size, workers=count), 24)
        for size in batch_sizes
        for count in sorted({max(1, setup.workers // 2), setup.workers})
    }
    long = f"{batches} batches of {setup.batch_size}"
    runs[long] = (setup, batches)
    rows = []
    for name, (each, count) in runs.items():
        report(f"memory: {name}")
        imported, peak, host, device = in_new_process(each, count)
        figures: dict[str, tuple[float, list[float]]] = {
            "peak on the host": (peak, []),
            "of it the loader's": (peak - imported, []),
            "peak on the device": (max(device), []),
            "growth on the host": (growth(host), host),
            "growth on the device": (growth(device), device),
        }
        for measure, (value, readings) in figures.items():
            absent = "device" in measure and setup.device == "cpu"
            if not absent and (name == long or "growth" not in measure):
                rounds = " ".join(f"{reading:.0f}" for reading in readings)
                row = Row("memory", f"{name}: {measure}", "MiB", round(value, 1), rounds=rounds)
                rows.append(replace(row, kind="ours", device=setup.device))
    return rows


def growth(readings: Sequence[float]) -> float:
    """Highest reading of the second half less the highest of the first, after a tenth for warming up."""
    settled = readings[len(readings) // 10 :]
    half = len(settled) // 2
    return max(settled[half:]) - max(settled[:half])


def in_new_process(setup: Setup, batches: int) -> tuple[float, float, list[float], list[float]]:
    """Run a loader in a new process, for a process seldom returns memory.

    Returns MiB: the resident set before the loader was made, its peak, and at equal distances over the
    batches the resident set and what the GPU has in use above what it had before.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_watch, setup, batches).result()


def _watch(setup: Setup, count: int) -> tuple[float, float, list[float], list[float]]:
    torch.set_num_threads(1)
    before, imported = _device(setup), _host("VmRSS")
    host, device = [], []
    source = batches(setup, setup.views)
    every = max(1, count // _SAMPLES)
    for number in range(count):
        next(source)
        if number % every == every - 1:
            host.append(_host("VmRSS"))
            device.append(_device(setup) - before)
    # getrusage would count the parent of a new process; Linux counts the peak by rough steps.
    return imported, max(_host("VmHWM"), *host), host, device


def _host(field: str) -> float:
    """Memory of this process in MiB, by its name in Linux's status file."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(f"{field}:"))


def _device(setup: Setup) -> float:
    free, total = torch.cuda.mem_get_info() if setup.device == "gpu" else (0, 0)
    return (total - free) / 2**20
