"""Signals: finish the step, save and exit; and how a run recognises its own restart by torchrun."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from . import ranks

__all__ = ["Interrupt", "began", "launch", "restartable"]

# Ranks must leave at the same step, or those that stay wait for ever. They agree at intervals that are short
# enough to save within torchrun's 30 seconds of grace, and long enough to cost little with short steps.
_SECONDS = 3.0
_MOST = 50
_PATIENCE = 20.0  # seconds for a batch once a signal has come; torchrun and SLURM kill after 30

T = TypeVar("T")


class Interrupt:
    """Inside the block SIGTERM, SIGINT and SIGUSR1 are noted instead of obeyed; a second Ctrl-C is obeyed.

    The other signals may come twice: from the job manager, and from torchrun, which passes its own on.
    A run that waits for one of its `batches` for `patience` seconds after a signal does not save but obeys.
    """

    def __init__(self, patience: float = _PATIENCE) -> None:
        self.signalled = False
        self._number, self._waiting, self._patience = 0, False, patience
        self.ctrl_c = False
        """Whether this process got SIGINT."""
        self._before: dict[int, Any] = {}
        self._interval = self._left = 1  # steps from one agreement to the next, and until then

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
        self._since = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signalled, self._number = True, number
        self._set_alarm()
        if number == signal.SIGINT:
            self.ctrl_c = True
            signal.signal(number, self._before[number])

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """The batches of a loader."""
        coming = iter(loader)
        while True:
            self._waiting = True
            self._set_alarm()
            try:
                batch = next(coming)
            except StopIteration:
                return
            finally:
                self._waiting = False
                if self.signalled:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            yield batch

    def _set_alarm(self) -> None:
        if self.signalled and self._waiting:
            signal.setitimer(signal.ITIMER_REAL, self._patience)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        told = f"No batch came within {self._patience:g} s after the signal: the run ends without saving; "
        os.write(2, f"{told}continue it from its last checkpoint with --resume.\n".encode())
        # As without a handler: an exit by exception would wait for the threads that read.
        signal.signal(self._number, signal.SIG_DFL)
        os.kill(os.getpid(), self._number)
        os._exit(128 + self._number)  # process 1 of a container ignores a signal without a handler

    def seen(self) -> bool:
        """Whether any rank was signalled; called after every step, and the same on all ranks."""
        if ranks.world() == 1:
            return self.signalled
        self._left -= 1
        if self._left:
            return False
        per_step = (time.perf_counter() - self._since) / self._interval
        signalled, slowest = ranks.greatest(self.signalled, per_step)
        self._interval = self._left = min(max(int(_SECONDS / slowest), 1), _MOST)
        self._since = time.perf_counter()
        return bool(signalled)


def launch() -> str:
    """What the processes of one torchrun share, also when it has restarted them; "" without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none":
        return name
    # Every launch without a name has this one, but each agent makes a new folder for its workers' errors.
    parents = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents
    return str(parents[2]) if len(parents) > 3 else ""


def began(name: str) -> bool:
    """Whether the processes that noted this `launch` were ours, which torchrun has started again.

    The count of restarts does not say it: a launch that was refused is restarted, too.
    """
    return ranks.any_rank(name == launch() != "")


def restartable() -> bool:
    """Whether torchrun starts this process again if it ends with another code than 0."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
