"""Progress of long work: a bar on a terminal, else a plain line every half minute, as for a log of SLURM."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from tqdm import tqdm

SECONDS = 30.0
"""Between two lines. Work that ends sooner has none."""


class Progress:
    """Counts up to `total`; what is shown goes to the standard error."""

    def __init__(self, total: int, unit: str, initial: int = 0, disable: bool = False) -> None:
        self._total, self._unit, self._done, self._first = total, unit, initial, initial
        self._notes = ""
        self._begun = self._told = time.monotonic()
        self._lines = not disable and not sys.stderr.isatty()
        hidden = disable or self._lines
        self._bar = tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True, disable=hidden)

    def update(self) -> None:
        """One more is done."""
        self._done += 1
        self._bar.update()
        now = time.monotonic()
        if now - self._told >= SECONDS:
            self.line()

    def line(self) -> None:
        """Print the line now, unless there is a bar."""
        if self._lines:
            self._told = time.monotonic()
            spent = self._told - self._begun
            left = spent / max(1, self._done - self._first) * (self._total - self._done)
            place, times = f"{self._done} of {self._total}", f"{_clock(spent)} so far, {_clock(left)} left"
            print(f"{self._unit} {place}, {self._notes}{times}", file=sys.stderr, flush=True)

    def note(self, values: Mapping[str, Any]) -> None:
        """What to show beside the count from now on."""
        self._bar.set_postfix(values)
        self._notes = "".join(f"{name} {value}, " for name, value in values.items())

    def close(self) -> None:
        """The work has ended."""
        self._bar.close()


def _clock(seconds: float) -> timedelta:
    return timedelta(seconds=round(seconds))
