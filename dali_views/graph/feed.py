"""The DALI graph of one loader at work: plans go in ahead of time, views come out in the same order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from ..data.source import AHEAD, ReadAhead, Reading
from ..plan.draw import I32, I64, Plan
from ..plan.views import View
from ..system.machine import stage
from .build import Images, build, inputs
from .views_cpu import Views

if TYPE_CHECKING:
    from ..data.index import SampleIndex


class Feed:
    """Runs the graph batch by batch, from any position on. `options` are the other arguments of `build`."""

    def __init__(self, index: SampleIndex, views: Sequence[View], **options: Any) -> None:
        self._coming = _Coming(index, views)
        self._options = {"form": index.form, "usual": _usual_size(index.sizes), **options}
        self._pipeline: Any = None
        self._process = 0  # that built the graph

    @property
    def awaited(self) -> I64:
        """Rows of all images of the batch that `take` returns next, or has just failed to make."""
        return np.concatenate(self._coming.rows(self._coming.planned[0]))

    def check_process(self) -> None:
        """A RuntimeError in a fork, which has the graph without its threads: it would wait for ever."""
        if self._pipeline is not None and self._process != os.getpid():
            raise RuntimeError(
                f"This loader has iterated in process {self._process}; its fork, process {os.getpid()}, has "
                "the graph without its threads; make a ViewLoader in each process that needs one."
            )

    def seek(self, plan_at: Callable[[int], Plan], positions: range) -> None:
        """Discard what is in progress; continue with the batches that begin at `positions` (in samples)."""
        self._coming.forget()
        if self._pipeline is not None:
            self._drain()
        if self._pipeline is None:
            coming = self._coming
            if self._options["device"] == "cpu":
                # A new one: a graph that failed may still be at work with its own.
                form = {name: self._options[name] for name in ("threads", "dtype", "mean", "std")}
                coming.maker = Views(coming.views, **form)
            # The graph keeps `_coming`, not this feed. Without a cycle, both are freed as soon as dropped.
            self._pipeline = build(coming.views, coming.batch, maker=coming.maker, **self._options)
            self._process = os.getpid()
        self._coming.planned.clear()
        self._coming.plan_at, self._coming.positions = plan_at, iter(positions)

    def take(self, *stream: Any) -> tuple[Plan, list[torch.Tensor]] | None:
        """The next plan and its V views (B, H, W, 3); None at the end of the epoch.

        On a GPU, give the CUDA stream that will use the views.

        Raises:
            RuntimeError: an image of `awaited` cannot be read. Then `seek` before taking again.
        """
        try:
            with stage("dali_views: wait for views"):
                outputs = self._pipeline.run(*stream)
        except StopIteration:
            self._coming.forget()
            return None
        except RuntimeError:
            self._pipeline = None  # a graph that failed may not be used again
            raise
        maker = self._coming.maker
        # DALI's dynamic executor gives every batch memory of its own, so DLPack needs no copy.
        views = maker.take() if maker else [from_dlpack(output.as_tensor()) for output in outputs]
        return self._coming.planned.popleft(), views

    def _drain(self) -> None:
        """Run the graph to the end of its epoch, so that it can begin another one."""
        try:
            while True:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
            if self._coming.maker is not None:
                self._coming.maker.drop()
        except RuntimeError:  # an unreadable image that nobody waits for any more
            self._pipeline = None


def _usual_size(sizes: I32) -> tuple[int, int]:
    """The height and the width that 5 % of the images exceed, by a sample of sizes (N, 2)."""
    some = sizes[:: max(1, len(sizes) // 10_000)]
    height, width = np.quantile(some, 0.95, axis=0, method="higher").tolist()
    return height, width


class _Coming:
    """The batches that are about to enter the graph, and the plans of those inside it."""

    def __init__(self, index: SampleIndex, views: Sequence[View]) -> None:
        self.views = views
        self.maker: Views | None = None  # on the CPU
        self.plan_at: Callable[[int], Plan]
        self.positions = iter(range(0))
        self.planned: deque[Plan] = deque()
        self._index = index
        self._partnered = any(view.partner for view in views)
        reader = index.reader
        self._reader = None if reader is None else ReadAhead(reader)
        self._read: deque[tuple[Plan, list[Images | Reading]]] = deque()  # planned, and being read

    def forget(self) -> None:
        """End the epoch: plan no more batches, and drop those that are being read ahead."""
        self.positions = iter(range(0))
        self._read.clear()
        if self._reader is not None:
            self._reader.forget()

    def batch(self) -> list[Any]:
        """Inputs of the graph for the next batch. DALI calls this ahead of `Feed.take`."""
        ahead = 0 if self._reader is None else AHEAD
        while len(self._read) <= ahead and (position := next(self.positions, None)) is not None:
            with stage("dali_views: plan"):
                drawn = self.plan_at(position)
            self._read.append((drawn, [self._begin(rows) for rows in self.rows(drawn)]))
        if not self._read:
            raise StopIteration
        drawn, images = self._read.popleft()
        self.planned.append(drawn)
        read = [each.wait() if isinstance(each, Reading) else each for each in images]
        encoded = self._index.form != "pixels"
        sizes = [self._index.sizes[rows] for rows in self.rows(drawn)] if encoded else []
        if self.maker is not None:
            self.maker.expect(drawn.views)
            return inputs(read, sizes)
        return inputs(read, sizes, self.views, drawn.views)

    def rows(self, drawn: Plan) -> list[I64]:
        """Samples, and their partners if views are cut from these."""
        return [drawn.index, drawn.partner] if self._partnered else [drawn.index]

    def _begin(self, rows: I64) -> Images | Reading:
        return self._index.inputs(rows) if self._reader is None else self._reader.ask(rows)
