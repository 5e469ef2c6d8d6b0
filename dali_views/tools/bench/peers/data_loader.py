"""What several peers share: a DataLoader as its users build it, and an order for those without one."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ....data.index import SampleIndex
from ..contender import Batches, Setup


class Views(torch.utils.data.Dataset[list[Any]]):
    """The data set that most users write: open a file, apply one transform per view."""

    def __init__(
        self,
        index: SampleIndex,
        opened: Callable[[Any], Any],
        transforms: Sequence[Callable[[Any], Any]],
    ) -> None:
        self.index = index
        self.opened = opened
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> list[Any]:
        files = self.index.form == "names"
        image = self.opened(self.index.path(row) if files else io.BytesIO(self.index.encoded(row)))
        return [transform(image) for transform in self.transforms]


def loader_batches(dataset: torch.utils.data.Dataset[Any], setup: Setup, **options: Any) -> Batches:
    """Batches of a DataLoader over a data set whose items are lists of views."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=setup.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=setup.workers,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="forkserver",  # forking a process in which DALI has threads crashes
        **options,
    )
    while True:
        for batch in loader:
            yield len(batch[0])


def endless_rows(setup: Setup) -> Iterator[int]:
    """Every row once, in another order each time round, without end."""
    draw = np.random.default_rng(setup.seed)
    while True:
        yield from draw.permutation(len(setup.index)).tolist()
