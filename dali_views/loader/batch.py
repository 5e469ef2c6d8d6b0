"""What the loader hands out: a Batch, and the Stats of an epoch."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..plan.draw import Plan
from ..system.ranks import to_device

_FROM_PLAN = ("index", "crops", "flipped", "rotated", "boxes", "weights", "partner")


@dataclass(frozen=True)
class Batch:
    """B samples in V views, with their geometry and weights. All tensors are on the loader's device.

    Attributes:
        views: V tensors (B, 3, S, S), channels-last, normalised; S may differ between views. Those of
            `View.longest` are (B, 3, H, W), each image in the upper left of zeros.
        index: (B,) int64, row in the SampleIndex.
        label: (B,) int64, -1 where unknown.
        crops: (B, V, 4) float32, y0 x0 y1 x1 as fractions of the image the view was cut from.
        flipped: (B, V) bool, True where the view is mirrored left to right, before it is rotated.
        rotated: (B, V) uint8, right angles by which it is then rotated counter-clockwise, as by
            `torch.rot90`. A vertical flip is a mirror image rotated by 2. Without `vflip` and `rotate90`
            all are 0.
        boxes: (B, 4) float32, the semantic box the crops were drawn from.
        weights: (B,) float32, the weight of that box in the region table, 1 until one is written. Multiply
            the losses (B,) of the samples by it.
        partner: (B,) int64, sample that views with `View.partner` were cut from (itself if none).
        shapes: (B, V, 2) int32, height and width of each view in pixels, without padding.
    """

    views: list[torch.Tensor]
    index: torch.Tensor
    label: torch.Tensor
    crops: torch.Tensor
    flipped: torch.Tensor
    rotated: torch.Tensor
    boxes: torch.Tensor
    weights: torch.Tensor
    partner: torch.Tensor
    shapes: torch.Tensor

    @classmethod
    def of(
        cls, drawn: Plan, views: list[torch.Tensor], labels: NDArray[np.int32], device: torch.device
    ) -> Batch:
        """The batch of a plan, with V views that are already on the device and labels (B,)."""
        arrays = {name: getattr(drawn, name) for name in _FROM_PLAN} | {"label": labels.astype(np.int64)}
        arrays["shapes"] = np.stack([view.shape for view in drawn.views], axis=1).astype(np.int32)
        return cls(views, **_together(arrays, device))

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        kinds = Counter((tuple(view.shape), str(view.dtype).removeprefix("torch.")) for view in self.views)
        views = ", ".join(f"{count} x {shape} {dtype}" for (shape, dtype), count in kinds.items())
        return f"Batch({len(self)} samples, views: {views}, device={str(self.index.device)!r})"

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device, without copies if it is there. Lightning and Fabric call this."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        views = [view.to(device) for view in parts.pop("views")]
        return Batch(views, **{name: tensor.to(device) for name, tensor in parts.items()})


def _together(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """Copies of arrays as tensors on the device, parts of one block of memory that was sent at once."""
    # Wide numbers first, so that each part begins where numbers of its type may lie.
    names = sorted(arrays, key=lambda name: -arrays[name].itemsize)
    packed = np.concatenate([np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8) for name in names])
    sent = to_device(torch.from_numpy(packed), device)
    parts = torch.split(sent, [arrays[name].nbytes for name in names])
    return {
        name: part.view(getattr(torch, arrays[name].dtype.name)).view(arrays[name].shape)
        for name, part in zip(names, parts, strict=True)
    }


@dataclass
class Stats:
    """What the current (or last) epoch cost this rank."""

    images: int = 0
    batches: int = 0
    seconds: float = 0.0
    """From the first request for a batch until the latest one was handed out."""
    waited: float = 0.0
    """Seconds of these that the host waited for a batch. On a GPU, a batch is handed out before its views are
    ready, so this says little; see `gpu_waited`."""
    bad_images: int = 0
    """Images known to be unreadable, found in this or earlier epochs."""
    stream: StreamWaits | None = None
    """What the consumer's stream on the GPU waited; None on the CPU."""

    @property
    def images_per_second(self) -> float:
        """Images per second of the epoch so far; 0 before the first batch."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time that the host waited for the loader, in [0, 1]."""
        return self.waited / self.seconds if self.seconds else 0.0

    @property
    def gpu_waited(self) -> float | None:
        """Seconds that the consumer's stream on the GPU had nothing to do but wait for a batch, as far as the
        GPU has come; None on the CPU. Asking does not wait."""
        return None if self.stream is None else self.stream.seconds()

    @property
    def gpu_wait_share(self) -> float | None:
        """The same as a share of the time; None on the CPU."""
        waited = self.gpu_waited
        return None if waited is None else waited / self.seconds if self.seconds else 0.0


class StreamWaits:
    """The time that a stream of a GPU spends between pairs of marks that are put into it.

    When it comes to the first mark, all that was launched before is done; at the second, so is what it then
    waits for: it is idle between them.

    Args:
        mark: makes an event of CUDA; `record`, `query` and `elapsed_time` are used.
    """

    def __init__(self, mark: Callable[..., Any] = torch.cuda.Event) -> None:
        self._mark = partial(mark, enable_timing=True)
        self._pairs: deque[tuple[Any, Any]] = deque()  # that the stream has perhaps not come to yet
        self._seconds = 0.0

    @contextmanager
    def measured(self, *stream: Any) -> Iterator[None]:
        """Put one mark into the stream, by default the current one, before and one after."""
        first, second = self._mark(), self._mark()
        first.record(*stream)
        yield
        second.record(*stream)
        self._pairs.append((first, second))
        self.seconds()  # so that few marks are kept

    def seconds(self) -> float:
        """The sum over the pairs that the stream has passed."""
        while self._pairs and self._pairs[0][1].query():
            first, second = self._pairs.popleft()
            self._seconds += first.elapsed_time(second) / 1000
        return self._seconds
