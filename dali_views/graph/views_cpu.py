"""Views on the CPU: cut, resized, turned, coloured, blurred and normalised in one pass behind the decoder.

    decoded image --> crop --> antialiased resize --> turn, colour, blur, normalise --> its place in the batch
       (DALI)                  (torch, bytes)         (`colour_cpu`, compiled)

DALI's operators, which a GPU runs, do the same one by one for a whole batch, and their resize alone takes
several times as long as this pass (`tests/bench/results/cpu_operators_*.csv`). The graph calls `Views` by
`fn.python_function`; threads share the views, and both steps work without Python's lock.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from ..plan.draw import ViewPlan
from ..plan.views import View

U8 = NDArray[np.uint8]
_MODES = {"linear": "bilinear", "cubic": "bicubic"}
_NONE: dict[str, NDArray[Any]] = {
    "float32": np.empty((0, 1), np.uint16),
    "float16": np.empty((0, 1), np.float32),
}
_STRIDE = 32  # that padded views are multiples of


class Views:
    """Makes the views of decoded batches, in the order in which their plans were given to `expect`.

    Args:
        views: the V views.
        threads: views made at the same time.
        dtype: ``"float32"`` or ``"float16"``; mean, std: of RGB in [0, 1].
    """

    def __init__(
        self, views: Sequence[View], *, threads: int, dtype: str, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        from .colour_cpu import finish  # Numba's import takes a moment, which a GPU need not wait for

        self._finish = finish
        self._views = views
        self._threads = threads
        self._dtype = dtype
        self._mean = np.array([255.0 * m for m in mean], np.float32)
        self._scale = np.array([1.0 / (255.0 * s) for s in std], np.float32)
        self._expected: deque[Sequence[ViewPlan]] = deque()
        self._made: deque[list[torch.Tensor]] = deque()
        self._free: list[list[U8]] = [[] for _ in views]

    def expect(self, plans: Sequence[ViewPlan]) -> None:
        """The plans of the V views of the batch that enters the graph next."""
        self._expected.append(plans)

    def take(self) -> list[torch.Tensor]:
        """The V views (B, H, W, 3) of the earliest batch that was not taken."""
        return self._made.popleft()

    def drop(self) -> None:
        """Forget what was made."""
        self._made.clear()

    def __call__(self, *images: list[U8]) -> list[U8]:
        """Make the views of the images of a batch, and of its partners if there are any.

        The graph gets B empty arrays in return: it would copy the views.
        """
        plans = self._expected.popleft()
        of_view = [images[view.partner] for view in self._views]
        outputs = [self._output(number, plan) for number, plan in enumerate(plans)]
        # By samples, so that an image is still in the cache for its next view. A shared iterator balances
        # the load: blurred views take longer than others.
        todo = iter([(i, v) for i in range(len(images[0])) for v in range(len(plans))])

        def work() -> None:
            for i, v in todo:
                self._make(outputs[v][i], of_view[v][i], plans[v], i, _MODES[self._views[v].interpolation])

        for done in [_pool(self._threads).submit(work) for _ in range(self._threads)]:
            done.result()
        self._made.append([torch.from_numpy(output) for output in outputs])
        return [np.empty(0, np.uint8)] * len(images[0])

    def _make(self, out: NDArray[Any], image: U8, plan: ViewPlan, i: int, mode: str) -> None:
        """View `i` of a plan, into the upper left of (H, W, 3)."""
        start, end = plan.start[i].astype(np.intp), plan.end[i].astype(np.intp)
        (top, left), (bottom, right) = np.minimum(start, end).tolist(), np.maximum(start, end).tolist()
        # The copy is ours: torch's would start threads of its own.
        crop = np.ascontiguousarray(image[top:bottom, left:right])
        back = start > end
        height, width = plan.shape[i].astype(np.intp).tolist()
        # Strides of a channels-last batch of one, so that the result has them, too.
        pixels = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
        small = interpolate(pixels, (height, width), mode=mode, antialias=True)[0].permute(1, 2, 0).numpy()
        if plan.axes[i, 0, 0] == 0:  # its axes are swapped
            small, back = small.transpose(1, 0, 2), back[::-1]
        lines = np.ascontiguousarray(small).reshape(height, -1)
        none = _NONE[self._dtype]
        there = out.reshape(len(out), -1)
        full, half = (there, none) if self._dtype == "float32" else (none, there.view(np.uint16))
        colour = plan.matrix[i], plan.pivot[i], plan.sigma[i], plan.window[i], plan.solarise[i]
        self._finish(full, half, lines, back, *colour, self._mean, self._scale)

    def _output(self, number: int, plan: ViewPlan) -> NDArray[Any]:
        """(B, H, W, 3) for a view, zeros if it is padded, in memory that an earlier batch has freed, if any:
        the first use of fresh memory costs as much as a part of the view."""
        padded = self._views[number].longest is not None
        height, width = plan.shape.max(axis=0).astype(int).tolist()
        if padded:
            height, width = (_STRIDE * math.ceil(side / _STRIDE) for side in (height, width))
        shape = (len(plan.shape), height, width, 3)
        size = math.prod(shape) * np.dtype(self._dtype).itemsize
        free = self._free[number]
        memory = free.pop() if free else np.empty(0, np.uint8)
        if len(memory) < size:
            memory = np.empty(size, np.uint8)
        output = memory[:size].view(self._dtype).reshape(shape)
        # A tensor made from it keeps `output` alive as long as any part of the tensor is used.
        weakref.finalize(output, free.append, memory).atexit = False
        if padded:
            output.fill(0)
        return output


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """One pool for all graphs of the process."""
    return ThreadPoolExecutor(threads, thread_name_prefix="views")


# A forked process inherits the pool without its threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
