"""The DALI graph of one loader at work: plans go in ahead of time, views come out in the same order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakMethod

import torch
from torch.utils.dlpack import from_dlpack

from ..data.index import SampleIndex
from ..data.read_ahead import AHEAD, ReadAhead, Reading
from ..plan.draw import I64, Plan
from ..plan.views import View
from ..system.machine import stage
from . import build as pipeline


class Feed:
    """Runs the graph batch by batch from any position on.

    Args:
        index: where the images are.
        views: the V views to cut.
        plan_at: a method that gives the plan of the batch which begins at a position (in samples). Whose it
            is must outlive the feed, which does not keep it.
        stride: samples from one batch's position to the next one's.
        device: ``"gpu"`` or ``"cpu"``; device_id: CUDA ordinal, None on the CPU.
        options: the other ones of `pipeline.build`.
    """

    def __init__(
        self,
        index: SampleIndex,
        views: Sequence[View],
        plan_at: Callable[[int], Plan],
        stride: int,
        *,
        device: str,
        device_id: int | None,
        **options: Any,
    ) -> None:
        self._index = index
        self._views = views
        # Loader, feed and graph would keep each other, and the graph's memory, until Python looks for cycles.
        self._plan_at = WeakMethod(plan_at)
        self._stride = stride
        self._device_id = device_id
        self._options = {
            "device": device,
            "device_id": device_id,
            "form": index.form,
            **options,
        }
        self._partnered = any(view.source == "partner" for view in views)
        self._pipeline: Any = None
        self._reader = None if index.source is None else ReadAhead(index.source)
        self._ahead = 0 if self._reader is None else AHEAD
        # Batches that are drawn but not yet in the graph, and the plans of those that are in it.
        self._asked: deque[tuple[Plan, list[pipeline.Images | Reading]]] = deque()
        self._planned: deque[Plan] = deque()
        self._next, self._stop = 0, 0

    @property
    def awaited(self) -> Plan:
        """The plan of the batch that `take` returns next, or has just failed to make."""
        return self._planned[0]

    def seek(self, position: int, stop: int) -> None:
        """Continue at `position`, discarding what is under way; the last batch begins before `stop`."""
        self._forget()
        if self._pipeline is not None:
            self._drain()
        if self._pipeline is None:
            source = WeakMethod(self._source)
            self._pipeline = pipeline.build(self._views, lambda: source()(), **self._options)  # type: ignore[misc]
        self._planned.clear()
        self._next, self._stop = position, stop

    def take(self) -> tuple[Plan, list[torch.Tensor]] | None:
        """The next plan and its V views (B, 3, S, S), channels-last; None at the end of the epoch.

        Raises:
            RuntimeError: if an image of `awaited` cannot be read. Then `seek` before taking again.
        """
        stream = [] if self._device_id is None else [torch.cuda.current_stream(self._device_id)]
        try:
            with stage("dali_views: wait for views"):
                outputs = self._pipeline.run(*stream)
        except StopIteration:
            self._forget()
            return None
        except RuntimeError:
            # A graph that failed may not be used again.
            self._pipeline = None
            raise
        # DALI's dynamic executor gives every batch memory of its own, so DLPack needs no copy.
        views = [from_dlpack(out.as_tensor()).permute(0, 3, 1, 2) for out in outputs]
        return self._planned.popleft(), views

    def _drain(self) -> None:
        """Run the graph to the end of its epoch, so that it can begin another."""
        self._stop = 0  # the source ends at once; only what is under way comes out
        try:
            while True:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:  # an unreadable image that nobody waits for any more
            self._pipeline = None

    def _forget(self) -> None:
        """Drop the batches that are being read ahead."""
        self._asked.clear()
        if self._reader is not None:
            self._reader.forget()

    def _source(self) -> list[Any]:
        """Inputs of the graph for the batch after the last planned one. DALI calls it ahead of `take`."""
        while len(self._asked) <= self._ahead and self._next < self._stop:
            with stage("dali_views: plan"):
                drawn = self._plan_at()(self._next)  # type: ignore[misc]  # the loader lives: it called
            self._next += self._stride
            self._asked.append((drawn, [self._ask(rows) for rows in self._rows(drawn)]))
        if not self._asked:
            raise StopIteration
        drawn, asked = self._asked.popleft()
        self._planned.append(drawn)
        images = [each.wait() if isinstance(each, Reading) else each for each in asked]
        encoded = self._index.form != "pixels"
        sizes = [self._index.sizes[rows] for rows in self._rows(drawn)] if encoded else []
        return pipeline.inputs(images, sizes, self._views, drawn.views)

    def _rows(self, drawn: Plan) -> list[I64]:
        """Samples, and their partners if views are cut from these."""
        return [drawn.index, drawn.partner] if self._partnered else [drawn.index]

    def _ask(self, rows: I64) -> pipeline.Images | Reading:
        return self._index.inputs(rows) if self._reader is None else self._reader.ask(rows)
