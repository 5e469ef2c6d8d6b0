"""How fast the loader is beside torchvision's DataLoader: same folder, same views, same cores, one run.

The loaders take turns, round after round, so that a machine whose speed drifts hurts all alike; medians
of the rounds are reported. A loader exists during its own turn only, so that none works ahead while another
is measured. Small folders sit in the page cache: these are warm-cache figures.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable, Generator, Sequence
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

_BASE = "torchvision DataLoader (PIL)"
_EPOCH = 50_000  # images
_WARM_UP = 4  # batches: as many as the DataLoader's workers hold ready


@dataclass(frozen=True)
class Row:
    """One loader's result."""

    loader: str
    device: str
    images_per_second: float
    """Median over the rounds."""
    views_per_second: float
    ratio: float
    """Median over the rounds of images per second over torchvision's of the same round."""
    rounds: str
    """Images per second of every round, separated by spaces."""
    batch_size: int
    workers: int
    views: int
    size: int
    cache: str
    machine: str


def run(
    index: SampleIndex,
    views: Sequence[View],
    *,
    batch_size: int,
    device: str,
    workers: int,
    rounds: int,
    seconds: float,
) -> list[Row]:
    """Measure torchvision's DataLoader, the loader unguided and the loader guided by live boxes.

    Args:
        workers: DataLoader processes, and threads of the graph.
        rounds: turns that each loader takes; seconds: length of a turn, after a warm-up.
    """
    # A small folder is repeated, so that no one pays for the beginning and end of an epoch every few batches.
    index = index.subset(np.tile(np.arange(len(index)), -(-_EPOCH // len(index))))
    contenders: dict[str, tuple[str, Callable[[], Generator[int, None, None]]]] = {
        _BASE: ("cpu", lambda: _torchvision(index, views, batch_size, workers)),
        "dali_views": (device, lambda: _ours(index, views, batch_size, device, workers, guided=False)),
        "dali_views, guided": (device, lambda: _ours(index, views, batch_size, device, workers, guided=True)),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (_, start) in contenders.items():
            rates[name].append(_rate(start(), seconds))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    # Within a round the machine is most alike, so ratios are taken there.
    ratios = {
        name: statistics.median(ours / base for ours, base in zip(values, rates[_BASE], strict=True))
        for name, values in rates.items()
    }
    return [
        Row(
            loader=name,
            device=where,
            images_per_second=round(medians[name], 1),
            views_per_second=round(medians[name] * len(views), 1),
            ratio=round(ratios[name], 3),
            rounds=" ".join(f"{value:.1f}" for value in rates[name]),
            batch_size=batch_size,
            workers=workers,
            views=len(views),
            size=views[0].size,
            cache="warm",
            machine=machine(device),
        )
        for name, (where, _) in contenders.items()
    ]


def _rate(batches: Generator[int, None, None], seconds: float) -> float:
    """Images per second of one turn, from when processes run and queues are filled."""
    for _ in range(_WARM_UP):
        next(batches)
    began, images, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds:
        images += next(batches)
        elapsed = time.perf_counter() - began
    batches.close()
    return images / elapsed


def _ours(
    index: SampleIndex, views: Sequence[View], batch_size: int, device: str, threads: int, *, guided: bool
) -> Generator[int, None, None]:
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


def _torchvision(
    index: SampleIndex, views: Sequence[View], batch_size: int, workers: int
) -> Generator[int, None, None]:
    loader = torch.utils.data.DataLoader(
        _PILViews(index, views),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="forkserver",  # forking a process in which DALI has threads crashes
    )
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
    """What torchvision makes a `"random"`, `"whole"` or `"centre"` view with, in PIL as in MoCo v2's code."""
    resample = (
        v2.InterpolationMode.BICUBIC if view.interpolation == "cubic" else v2.InterpolationMode.BILINEAR
    )
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
    steps += [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    transform: Callable[[Image.Image], torch.Tensor] = v2.Compose(steps)
    return transform


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
    parts += [
        f"DALI {dali.__version__}",
        f"torch {torch.__version__}",
        f"torchvision {torchvision.__version__}",
    ]
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
        f"{row.loader:30s} {row.device:6s} {row.images_per_second:9.1f} {row.views_per_second:9.1f} "
        f"{row.ratio:14.2f}"
        for row in rows
    ]
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Save the results; a figure without its file is not quoted."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
