"""Updates of a region table that are still being copied from a GPU: no training step waits for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


class UpdateQueue:
    """Copies in progress, in the order of the calls."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[list[Any], dict[str, Any], int]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, values: Mapping[str, Any], epoch: int) -> None:
        """Start to copy the CUDA tensors among the values into pinned memory, in their streams' order.

        Values on the CPU are copied at once: the caller may overwrite them as soon as the call returns.
        """
        import torch

        events, copies = [], {}
        for name, value in values.items():
            if getattr(value, "is_cuda", False):
                copies[name] = value.detach().to("cpu", non_blocking=True)
                events.append(torch.cuda.current_stream(value.device).record_event())
            else:
                copies[name] = value.detach().clone() if hasattr(value, "detach") else np.array(value)
        self._waiting.append((events, copies, epoch))

    def arrived(self, wait: bool) -> Iterator[tuple[dict[str, Any], int]]:
        """Take out the values and the epoch of updates, oldest first: all of them if `wait`, else those
        before the first incomplete copy."""
        while self._waiting:
            events, values, epoch = self._waiting[0]
            if not wait and not all(event.query() for event in events):
                return
            for event in events:
                event.synchronize()
            self._waiting.popleft()
            yield values, epoch
