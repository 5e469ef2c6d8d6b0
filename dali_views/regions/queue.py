"""Updates of a region table that are on their way from a GPU, so that no training step waits for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Update", "UpdateQueue", "on_gpu"]


@dataclass(frozen=True)
class Update:
    """What one call of ``RegionTable.update`` was given, as it reaches the CPU, and its epoch."""

    values: Mapping[str, Any]
    epoch: int


def on_gpu(values: Mapping[str, Any]) -> bool:
    """Whether any of the values is a CUDA tensor; does not import torch."""
    return any(getattr(value, "is_cuda", False) for value in values.values())


class UpdateQueue:
    """Copies under way, in the order of the calls."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Any, Update]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, values: Mapping[str, Any], epoch: int) -> None:
        """Begin to copy the CUDA tensors among the values into pinned memory, behind their streams' work.

        Values on the CPU are copied at once, for the caller may write to them as soon as the call returns.
        """
        import torch

        events, copies = [], {}
        for name, value in values.items():
            if getattr(value, "is_cuda", False):
                copies[name] = value.detach().to("cpu", non_blocking=True)
                events.append(torch.cuda.current_stream(value.device).record_event())
            else:
                copies[name] = value.detach().clone() if hasattr(value, "detach") else np.array(value)
        self._waiting.append((events, Update(copies, epoch)))

    def arrived(self, wait: bool) -> Iterator[Update]:
        """Take out updates, oldest first: all of them if `wait`, else those whose copies are complete."""
        while self._waiting:
            events, update = self._waiting[0]
            if not wait and not all(event.query() for event in events):
                return
            for event in events:
                event.synchronize()
            self._waiting.popleft()
            yield update
