"""What takes part in a comparison: the setting shared by all, and a contender that hands out batches."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from ...data.index import SampleIndex
from ...plan.views import View

# Yields the number of images of each batch once its views are ready for use; endless. Closing it ends
# its threads and processes.
Batches = Generator[int, None, None]


@dataclass(frozen=True)
class Setup:
    """What every contender is given."""

    index: SampleIndex
    """The images, repeated so often that the ends of an epoch weigh nothing."""
    views: list[View]
    """The views to make of every image."""
    batch_size: int
    device: str
    """``"gpu"`` or ``"cpu"``: where our graph runs."""
    workers: int
    """Processes of those who have processes, threads of those who have threads."""
    hw_decoder_load: float = 0.65
    seed: int = 0


@dataclass(frozen=True)
class Contender:
    """One row of the table."""

    name: str
    kind: str
    """``"limit"``, ``"ours"`` or ``"peer"``."""
    device: str
    """``"gpu"`` or ``"cpu"``: where it decodes and cuts."""
    start: Callable[[], Batches]
    views: int
    """Views made per image; 0 for a limit that makes none."""
    note: str = ""
    """In what it differs from the task that all others do, for instance another blur."""
