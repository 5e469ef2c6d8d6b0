"""Everything that changes over a run as a pure function of where the run is."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Clock", "cosine", "linear", "lr_at"]


@dataclass(frozen=True)
class Clock:
    """Where a run is: before the optimiser step number `step`, counted from 0."""

    step: int
    steps_per_epoch: int
    epochs: int

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    @property
    def epoch(self) -> int:
        """Epoch of this step, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def share(self) -> float:
        """Share of the run that lies behind, in [0, 1]."""
        return min(1.0, self.step / self.total)


def cosine(share: float, start: float, end: float) -> float:
    """Half a cosine from `start` (share 0) to `end` (share 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def linear(epoch: int, epochs: int, start: float, end: float) -> float:
    """`start` in epoch 0, `end` from epoch `epochs - 1` on, a straight line between; `end` if epochs is 0."""
    if epoch >= epochs - 1:
        return end
    return start + (end - start) * epoch / (epochs - 1)


def lr_at(step: int, total: int, warmup: int, base: float, minimum: float = 0.0) -> float:
    """Learning rate of one step: linear warm-up, then half a cosine.

    Args:
        step: optimiser step, counted from 0.
        total: steps of the whole run; from there on the rate stays at `minimum`.
        warmup: steps of linear growth; step i < warmup has base * (i + 1) / warmup, so none is lost at 0.
        base: the peak rate.
        minimum: the rate at step `total`.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    return cosine(min(1.0, (step - warmup) / max(1, total - warmup)), base, minimum)
