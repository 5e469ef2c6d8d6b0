"""Ending a run well when the machine is taken away: SIGTERM and Ctrl-C finish the step, save and exit."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

from . import distributed

__all__ = ["Interrupt"]

# Ranks must leave at the same step, or those that stay wait for ever; they agree every so many steps.
_AGREE_EVERY = 10


class Interrupt:
    """While entered, SIGTERM and SIGINT are noted instead of obeyed; a second one is obeyed."""

    def __init__(self) -> None:
        self.signalled = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def seen(self, step: int) -> bool:
        """Whether any rank was signalled; all ranks get the same answer at the same step."""
        if distributed.world() == 1:
            return self.signalled
        return step % _AGREE_EVERY == 0 and distributed.any_rank(self.signalled)
