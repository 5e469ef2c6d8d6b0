"""How fast the loader is beside torchvision's DataLoader: same folder, same views, same cores, one run.

The loaders take turns, round after round, so that a machine whose speed drifts hurts all alike; medians
of the rounds are reported. Small folders sit in the page cache: these are warm-cache figures.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from nvidia import dali
from PIL import Image, ImageFilter
from torchvision.transforms import v2

from .index import SampleIndex
from .loader import IMAGENET_MEAN, IMAGENET_STD, ViewLoader
from .regions import RegionTable
from .views import View


@dataclass(frozen=True)
class Row:
    """One loader's result."""

    loader: str
    device: str
    images_per_second: float
    """Median over the rounds."""
    views_per_second: float
    ratio: float
    """Images per second over torchvision's."""
    rounds: str
    """Images per second of every round, separated by spaces."""
    batch_size: int
    workers: int
    views: int
    size: int
    cache: str
    machine: str


def run(
    index: SampleIndex, views: Sequence[View], *, batch_size: int, device: str, workers: int, rounds: int,
    seconds: float,
) -> list[Row]:  # fmt: skip
    """Measure torchvision's DataLoader, the loader unguided and the loader guided by live boxes.

    Args:
        workers: DataLoader processes, and threads of the graph.
        rounds: turns that each loader takes; seconds: length of a turn, after one batch of warm-up.
    """
    contenders: dict[str, tuple[str, Iterator[int]]] = {
        "torchvision DataLoader (PIL)": ("cpu", _torchvision(index, views, batch_size, workers)),
        "dali_views": (device, _ours(index, views, batch_size, device, workers, guided=False)),
        "dali_views, guided": (device, _ours(index, views, batch_size, device, workers, guided=True)),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (_, batches) in contenders.items():
            rates[name].append(_rate(batches, seconds))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    base = medians["torchvision DataLoader (PIL)"]
    return [
        Row(
            loader=name, device=where, images_per_second=round(medians[name], 1),
            views_per_second=round(medians[name] * len(views), 1), ratio=round(medians[name] / base, 3),
            rounds=" ".join(f"{value:.1f}" for value in rates[name]), batch_size=batch_size, workers=workers,
            views=len(views), size=views[0].size, cache="warm", machine=machine(device),
        )
        for name, (where, _) in contenders.items()
    ]  # fmt: skip


def _rate(batches: Iterator[int], seconds: float) -> float:
    """Images per second of one turn. The first batch refills the queues that idled during the others' turns."""
    next(batches)
    began, images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds or images == 0:
        images += next(batches)
    return images / elapsed


def _ours(
    index: SampleIndex, views: Sequence[View], batch_size: int, device: str, threads: int, *, guided: bool
) -> Iterator[int]:
    regions = None
    if guided:
        regions = RegionTable(len(index))
        low = np.random.default_rng(0).uniform(0.0, 0.4, (len(index), 2)).astype(np.float32)
        regions.update(np.arange(len(index)), np.concatenate([low, low + 0.5], axis=1))
        views = [View(**{**asdict(view), "crop": "contrastive"}) for view in views]
    loader = ViewLoader(index, views, batch_size, regions=regions, device=device, threads=threads)
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        for batch in loader:
            if device == "gpu":
                torch.cuda.synchronize()
            yield len(batch)
        epoch += 1


def _torchvision(index: SampleIndex, views: Sequence[View], batch_size: int, workers: int) -> Iterator[int]:
    loader = torch.utils.data.DataLoader(
        _PILViews(index, views), batch_size=batch_size, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=True, pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    while True:
        for batch in loader:
            yield len(batch[0])


class _PILViews(torch.utils.data.Dataset[list[torch.Tensor]]):
    """What a torchvision user writes: open with PIL, apply one transform per view."""

    def __init__(self, index: SampleIndex, views: Sequence[View]) -> None:
        self.index = index
        self.transforms = [torchvision_transform(view) for view in views]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> list[torch.Tensor]:
        image = Image.open(self.index.path(row)).convert("RGB")
        return [transform(image) for transform in self.transforms]


def torchvision_transform(view: View) -> Callable[[Image.Image], torch.Tensor]:
    """The torchvision transforms of a `"random"`, `"whole"` or `"centre"` view, in PIL as MoCo v2's code has them."""
    resample = v2.InterpolationMode.BICUBIC if view.interpolation == "cubic" else v2.InterpolationMode.BILINEAR
    size = [view.size, view.size]
    steps: list[Any] = {
        "whole": [v2.Resize(size, resample)],
        "centre": [v2.Resize(round(view.size / view.centre_share), resample), v2.CenterCrop(view.size)],
    }.get(view.crop, [v2.RandomResizedCrop(size, view.scale, view.ratio, resample)])
    if view.flip:
        steps.append(v2.RandomHorizontalFlip(view.flip))
    if view.jitter:
        jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        steps.append(v2.RandomApply([jitter], view.jitter))
    if view.grayscale:
        steps.append(v2.RandomGrayscale(view.grayscale))
    if view.blur:
        steps.append(v2.RandomApply([_PILBlur(view.sigma)], view.blur))
    if view.solarise:
        steps.append(v2.RandomSolarize(128, view.solarise))
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return v2.Compose(steps)


class _PILBlur(torch.nn.Module):
    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        radius = float(torch.empty(1).uniform_(*self.sigma))
        return image.filter(ImageFilter.GaussianBlur(radius))


def machine(device: str) -> str:
    """The configuration that a figure belongs to, without the machine's name or address."""
    parts = [f"{len(os.sched_getaffinity(0))} cores", _processor()]
    if device == "gpu":
        parts.append(torch.cuda.get_device_name())
    parts += [f"DALI {dali.__version__}", f"torch {torch.__version__}", f"torchvision {torchvision.__version__}"]
    return ", ".join(part for part in parts if part)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(rows: Sequence[Row]) -> str:
    """The results as text for a terminal."""
    lines = [f"{'loader':30s} {'device':6s} {'images/s':>9s} {'views/s':>9s} {'x torchvision':>14s}"]
    lines += [
        f"{row.loader:30s} {row.device:6s} {row.images_per_second:9.1f} {row.views_per_second:9.1f} {row.ratio:14.2f}"
        for row in rows
    ]
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Save the results; a figure without its file is not quoted."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
