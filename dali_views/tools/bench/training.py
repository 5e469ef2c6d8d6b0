"""What loading costs a training: the model on one resident batch, the loader alone, both together.

The model is a torchvision ResNet with a contrastive loss, in mixed precision on a GPU. "Lost
to loading" is what `both` falls short of `model alone`; on a GPU that decodes, it also holds the decoding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
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
from .contest import IMAGES, OF_TIME, Batches, Contender, Report, Row, Setup, joined, median_ratio, take_turns
from .loaders import endless, guided, loader_of, table_of_boxes


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
        if self.device.type == "cuda":
            # A GPU may be one step behind, no more: otherwise steps would count that are only queued.
            if self._last is not None:
                self._last.synchronize()
            self._last = torch.cuda.current_stream().record_event()

    def embed(self, view: Tensor) -> Tensor:
        """(B, 128), in mixed precision on a GPU."""
        kind = self.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            embedding: Tensor = self.model(view)
        return embedding

    def boxes(self, size: int) -> Tensor:
        """(B, 4) boxes on the images or views of the model's last forward pass."""
        return boxes_from_maps(activation_map(self.tap.features.detach()), 0.1, (size, size))


def measure(setup: Setup, name: str, rounds: int, seconds: float, report: Report) -> list[Row]:
    """Rows of images/s with one of torchvision's ResNets, and of the shares of time of loading and guiding.

    Raises:
        ValueError: if the recipe makes fewer than two views.
    """
    if len(setup.views) < 2:
        raise ValueError("Training compares two views of an image, and the recipe makes one; take another.")
    device = torch.device("cuda" if setup.device == "gpu" else "cpu")
    trainer = _Trainer(name, device)
    table = table_of_boxes(setup)
    loader = partial(loader_of, setup, guided(setup.views), table)
    resident = next(iter(loader()))
    shares: dict[str, list[float]] = {"waiting for a batch": [], "updating rows": [], "boxes off maps": []}

    def alone() -> Batches:
        while True:
            trainer(resident.views)
            yield len(resident)

    def loading() -> Batches:
        for batch in endless(loader()):
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield len(batch)

    def both(extra: str = "", after: Callable[[Batch], None] = lambda batch: None) -> Batches:
        source, inside, began = loader(), 0.0, time.perf_counter()
        try:
            for batch in endless(source):
                trainer(batch.views)
                done = time.perf_counter()
                after(batch)
                inside += time.perf_counter() - done
                yield len(batch)
        finally:
            share = inside / (time.perf_counter() - began) if extra else source.stats.wait_share
            shares[extra or "waiting for a batch"].append(share)

    def update(batch: Batch) -> None:
        # As a step's own boxes and weights would be: on the model's device.
        table.update(batch.index, resident.boxes, resident.weights)

    def online(batch: Batch) -> None:
        # The step's last forward pass saw the second view.
        on_view = trainer.boxes(setup.views[1].size)
        table.update(batch.index, boxes_to_image(on_view, batch.crops[:, 1], batch.flipped[:, 1], clip=True))

    def localise() -> Batches:
        size = setup.views[0].size
        for batch in endless(loader_of(setup, recipes.localisation(size))):
            with torch.no_grad():
                trainer.embed(batch.views[0])
            table.update(batch.index, trainer.boxes(size))
            yield len(batch)

    starts: dict[str, Callable[[], Batches]] = {
        "model alone": alone,
        "loader alone": loading,
        "both": both,
        "both, rows updated every step": partial(both, "updating rows", update),
        "both, boxes off every step's maps": partial(both, "boxes off maps", online),
        "localisation pass": localise,
    }
    contenders = [Contender(key, "ours", setup.device, start, 2) for key, start in starts.items()]
    rates = take_turns(contenders, rounds, seconds, report=report)
    model = rates["model alone"]
    shares["lost to loading"] = [1.0 - both / alone for alone, both in zip(model, rates["both"], strict=True)]

    def row(key: str, measure: str, values: list[float], ratio: float | None = None) -> Row:
        value, label = round(median(values), 1 if measure == IMAGES else 5), f"{name}: {key}"
        return Row("training", label, measure, value, ratio, None, joined(values), "ours", setup.device)

    speeds = [row(key, IMAGES, values, median_ratio(values, model)) for key, values in rates.items()]
    return speeds + [row(key, OF_TIME, values) for key, values in shares.items()]
