"""Two measures of training: its speed, and whether the embeddings collapse."""

from __future__ import annotations

import math
import time
import warnings

import torch
from torch import Tensor

from dali_views import ViewLoader

from ..methods.heads import normalise


class Throughput:
    """Speed of training alone: what lies between `pause` and the next step is left out.

    The loader's own statistics restart at every epoch and do not know when a GPU has finished a step.
    `images` counts those of one step, on all ranks.
    """

    def __init__(self, loader: ViewLoader, images: int) -> None:
        self._loader, self._images, self._stats = loader, images, loader.stats
        self._since: tuple[float, int] | None = None  # seconds, and steps taken
        self._counted = self._waited = 0.0
        self.latest: dict[str, float] = {}  # result of `read`

    def pause(self) -> None:
        """Something other than training begins: an evaluation, a pass of the guide."""
        self._since = None

    def step(self, step: int) -> None:
        """Step number `step` (from 1) has been launched."""
        stats = self._loader.stats  # replaced at every epoch
        self._waited += stats.waited - (self._counted if stats is self._stats else 0.0)
        self._stats, self._counted = stats, stats.waited
        if self._since is None:
            self._since, self._waited = (time.perf_counter(), step), 0.0

    def read(self, step: int) -> dict[str, float]:
        """images_per_second, and wait_share, the share of the time in which the loop waited for the loader,
        up to step number `step`, which has ended. Empty at the first step after a pause."""
        if self._since is None or step == self._since[1]:
            return {}
        now = time.perf_counter()
        seconds, steps = now - self._since[0], step - self._since[1]
        self.latest = {
            "images_per_second": self._images * steps / seconds,
            "wait_share": self._waited / seconds,
        }
        self._since, self._waited = (now, step), 0.0
        return self.latest


class Collapse:
    """Measures embeddings and warns once when they have collapsed."""

    least_spread, least_rank = 0.05, 1.5
    warned = False

    def measure(self, embedding: Tensor) -> dict[str, float]:
        """`embedding_std` and `embedding_rank` of a batch (B, D). Waits for the device."""
        width, rank = spread(embedding), effective_rank(embedding)
        if (width < self.least_spread or rank < self.least_rank) and not self.warned:
            self.warned = True
            warnings.warn(
                f"the embeddings have collapsed (spread {width:.3f} of 1, effective rank {rank:.1f}); "
                "lower optim.lr, lengthen the warm-up or raise the momentum",
                stacklevel=3,
            )
        return {"embedding_std": width, "embedding_rank": rank}


@torch.no_grad()
def spread(embedding: Tensor) -> float:
    """Standard deviation over the batch of unit embeddings (B, D), times sqrt(D): 1 if they point in all
    directions alike, 0 if all are equal (SimSiam, arXiv 2011.10566, section 4.1, without the factor)."""
    unit = normalise(embedding)
    return float(unit.std(dim=0, correction=0).square().mean().sqrt()) * math.sqrt(unit.shape[1])


@torch.no_grad()
def effective_rank(embedding: Tensor) -> float:
    """exp of the entropy of the singular values of the unit embeddings (B, D), scaled to sum to 1: between 1
    (all on one line) and min(B, D) (RankMe, arXiv 2210.02885; Roy and Vetterli 2007). They are not centred,
    so that embeddings that differ only by noise have rank 1."""
    rows = normalise(embedding).double()
    # Through the smaller of the two products: DINO has 65,536 columns.
    product = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(product).clamp(min=0).sqrt()
    return float(torch.special.entr(values / values.sum()).sum().exp())
