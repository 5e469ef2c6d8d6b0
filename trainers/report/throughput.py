"""How fast training goes: images per second, and the share of the time that it waits for images."""

from __future__ import annotations

import time

from dali_views import ViewLoader

__all__ = ["Throughput"]


class Throughput:
    """Measures from one reading to the next; what lies between `pause` and the next step is left out.

    A loader's own statistics begin anew with every epoch, count batches that it had ready, and do not know
    when a GPU has come to the end of a step.

    Args:
        loader: of this rank.
        images: of one step, on all ranks.
    """

    def __init__(self, loader: ViewLoader, images: int) -> None:
        self._loader = loader
        self._images = images
        self._since: tuple[float, int] | None = None  # seconds, and steps taken
        self._stats = loader.stats  # of the epoch, of which there are new ones in the next
        self._counted = self._waited = 0.0
        self.latest: dict[str, float] = {}
        """What `read` found last; empty before that."""

    def pause(self) -> None:
        """Something else than training begins: an evaluation, a pass of the guide."""
        self._since = None

    def step(self, step: int) -> None:
        """Step number `step` (from 1) has been launched."""
        stats = self._loader.stats
        self._waited += stats.waited - (self._counted if stats is self._stats else 0.0)
        self._stats, self._counted = stats, stats.waited
        if self._since is None:
            self._start(step)

    def read(self, step: int) -> dict[str, float]:
        """What was measured up to step number `step`, which has ended: the device has been waited for.

        Returns:
            images_per_second, and wait_share, the share of the time in which the loop waited for the loader;
            nothing if no step lies between, as at the first one after a pause.
        """
        if self._since is None or step == self._since[1]:
            return {}
        seconds = time.perf_counter() - self._since[0]
        rate = self._images * (step - self._since[1]) / seconds
        self.latest = {"images_per_second": rate, "wait_share": self._waited / seconds}
        self._start(step)
        return self.latest

    def _start(self, step: int) -> None:
        self._since, self._waited = (time.perf_counter(), step), 0.0
