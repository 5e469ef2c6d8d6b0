"""Ending a run well when the machine is taken away: signals finish the step, save and exit."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

from . import ranks as distributed

__all__ = ["Interrupt"]

# Ranks must leave at the same step, or those that stay wait for ever. They agree at intervals that leave time
# to save within the 30 seconds after which torchrun kills, and that cost little where steps are short.
_SECONDS = 3.0
_MOST = 50


class Interrupt:
    """While entered, SIGTERM, SIGINT and SIGUSR1 are noted instead of obeyed; a second Ctrl-C is obeyed.

    Other signals may come twice: from the job manager, and from torchrun, which got it and passes it on.
    """

    def __init__(self) -> None:
        self.signalled = False
        self.ctrl_c = False
        """Whether it was by SIGINT, of this process."""
        self._before: dict[int, Any] = {}
        self._interval = self._left = 1  # steps from one agreement to the next, and until then

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        self._since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        if number == signal.SIGINT:
            self.ctrl_c = True
            signal.signal(number, self._before[number])

    def seen(self) -> bool:
        """Whether any rank was signalled; called after every step, and the same on all ranks."""
        if distributed.world() == 1:
            return self.signalled
        self._left -= 1
        if self._left:
            return False
        per_step = (time.perf_counter() - self._since) / self._interval
        signalled, slowest = distributed.greatest(self.signalled, per_step)
        self._interval = self._left = min(max(int(_SECONDS / slowest), 1), _MOST)
        self._since = time.perf_counter()
        return bool(signalled)
