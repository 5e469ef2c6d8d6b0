"""What loading costs a training: the model on one resident batch, the loader alone, both together.

The model is a torchvision ResNet with a contrastive loss between two views, mixed precision on a GPU. The
share of time lost is what `both` falls short of `model alone`; on a GPU that decodes for itself it holds more
than waiting, for decoding takes a share of the GPU too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import get_model

from ...loader.batch import Batch
from ...maps.boxes import boxes_from_maps
from ...maps.coordinates import boxes_to_image
from ...maps.heatmap import activation_map
from ...maps.tap import FeatureTap
from ...plan import recipes
from . import ours
from .contender import Batches, Contender, Setup
from .results import IMAGES, Row, joined, median_ratio
from .turns import take_turns

MODELS = ("resnet18", "resnet50")


class _Trainer:
    """A model with its optimiser: one call is one step."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self.model = get_model(name, num_classes=128).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.tap = FeatureTap(self.model, "layer4")
        self._last: Any = None

    def __call__(self, views: list[Tensor]) -> None:
        """Forward, backward and update on the first two views (B, 3, S, S)."""
        first, second = (F.normalize(self.embed(view).float()) for view in views[:2])
        loss = F.cross_entropy(first @ second.T / 0.2, torch.arange(len(first), device=self.device))
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self._keep_pace()

    def embed(self, view: Tensor) -> Tensor:
        """(B, 128), in mixed precision on a GPU."""
        kind = self.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            embedding: Tensor = self.model(view)
        return embedding

    def _keep_pace(self) -> None:
        """Let a GPU be one step behind, no more: otherwise steps would be counted that are only queued."""
        if self.device.type == "cuda":
            if self._last is not None:
                self._last.synchronize()
            self._last = torch.cuda.current_stream().record_event()


def measure(
    setup: Setup,
    *,
    rounds: int,
    seconds: float,
    models: Sequence[str] = MODELS,
    told: Callable[[str], None] = print,
) -> list[Row]:
    """Rows of images/s, and of the shares of time that loading and guiding take.

    Args:
        rounds, seconds: turns that each takes and their length, after a warm-up.
        models: names of torchvision ResNets.

    Raises:
        ValueError: if the recipe has no two views to set against each other.
    """
    if len(setup.views) < 2:
        raise ValueError("Training compares two views of an image, and the recipe makes one; take another.")
    return [row for name in models for row in _measure(setup, name, rounds, seconds, told)]


def _measure(setup: Setup, name: str, rounds: int, seconds: float, told: Callable[[str], None]) -> list[Row]:
    device = torch.device("cuda" if setup.device == "gpu" else "cpu")
    trainer = _Trainer(name, device)
    views = ours.guided(setup.views)
    table = ours.table_of_boxes(len(setup.index), 1, setup.seed)
    resident = next(iter(ours.loader(setup, views, table)))
    shares: dict[str, list[float]] = {"waiting for a batch": [], "updating rows": [], "boxes off maps": []}

    def alone() -> Batches:
        while True:
            trainer(resident.views)
            yield len(resident)

    def loading() -> Batches:
        for batch in ours.endless(ours.loader(setup, views, table)):
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield len(batch)

    def both(extra: str = "", after: Callable[[Batch], None] = lambda batch: None) -> Batches:
        loader, inside, began = ours.loader(setup, views, table), 0.0, time.perf_counter()
        try:
            for batch in ours.endless(loader):
                trainer(batch.views)
                done = time.perf_counter()
                after(batch)
                inside += time.perf_counter() - done
                yield len(batch)
        finally:
            share = inside / (time.perf_counter() - began) if extra else loader.stats.wait_share
            shares[extra or "waiting for a batch"].append(share)

    def update(batch: Batch) -> None:
        # What a step's own boxes and weights would be, on the model's device.
        table.update(batch.index, resident.boxes, resident.weights)

    def online(batch: Batch) -> None:
        # The step's last forward pass saw the second view.
        on_view = _boxes(trainer, setup.views[1].size)
        on_image = boxes_to_image(on_view, batch.crops[:, 1], batch.flipped[:, 1], clip=True)
        table.update(batch.index, on_image)

    def localise() -> Batches:
        size = setup.views[0].size
        for batch in ours.endless(ours.loader(setup, recipes.localisation(size))):
            with torch.no_grad():
                trainer.embed(batch.views[0])
            table.update(batch.index, _boxes(trainer, size))
            yield len(batch)

    starts: dict[str, Callable[[], Batches]] = {
        "model alone": alone,
        "loader alone": loading,
        "both": both,
        "both, rows updated every step": lambda: both("updating rows", update),
        "both, boxes off every step's maps": lambda: both("boxes off maps", online),
        "localisation pass": localise,
    }
    contenders = [
        Contender(key, "ours", setup.device, start, len(setup.views)) for key, start in starts.items()
    ]
    rates = take_turns(contenders, rounds, seconds, told=told)
    shares["lost to loading"] = [
        1.0 - together / model for model, together in zip(rates["model alone"], rates["both"], strict=True)
    ]

    def row(key: str, measure: str, values: list[float], digits: int) -> Row:
        return Row(
            part="training",
            name=f"{name}: {key}",
            measure=measure,
            value=round(statistics.median(values), digits),
            ratio=median_ratio(values, rates["model alone"]) if measure == IMAGES else None,
            rounds=joined(values),
            kind="ours",
            device=setup.device,
        )

    speeds = [row(key, IMAGES, values, 1) for key, values in rates.items()]
    return speeds + [row(key, "of time", values, 5) for key, values in shares.items()]


def _boxes(trainer: _Trainer, size: int) -> Tensor:
    """(B, 4) boxes on the images or views of the model's last pass."""
    return boxes_from_maps(activation_map(trainer.tap.features.detach()), 0.1, (size, size))
