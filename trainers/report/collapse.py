"""Collapse, told by two numbers: how far embeddings of different images lie apart, in how many directions."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from trainers.methods.heads import normalise

__all__ = ["Collapse", "effective_rank", "spread"]


@torch.no_grad()
def spread(embedding: Tensor) -> float:
    """Standard deviation over the batch of unit embeddings (B, D), times sqrt(D).

    1 for embeddings in all directions alike, 0 if all are equal (SimSiam, arXiv 2011.10566, section 4.1,
    where it is not multiplied and 1 / sqrt(D) is the healthy value).
    """
    unit = normalise(embedding)
    return float(unit.std(dim=0, correction=0).square().mean().sqrt()) * math.sqrt(unit.shape[1])


@torch.no_grad()
def effective_rank(embedding: Tensor) -> float:
    """exp of the entropy of the singular values of the unit embeddings (B, D), made to sum to 1.

    Between 1 (all on one line) and min(B, D) (RankMe, arXiv 2210.02885; Roy and Vetterli 2007). Not centred,
    so that embeddings that differ by noise only have rank 1.
    """
    rows = normalise(embedding).double()
    # Through the smaller of the two products: DINO has 65,536 columns.
    product = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(product).clamp(min=0).sqrt()
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


class Collapse:
    """Measures embeddings and warns once when they have collapsed."""

    least_spread = 0.05
    least_rank = 1.5

    def __init__(self) -> None:
        self.warned = False

    def measure(self, embedding: Tensor) -> dict[str, float]:
        """`embedding_std` and `embedding_rank` of a batch (B, D). Reads the device, which waits."""
        found = {"embedding_std": spread(embedding), "embedding_rank": effective_rank(embedding)}
        fallen = found["embedding_std"] < self.least_spread or found["embedding_rank"] < self.least_rank
        if fallen and not self.warned:
            self.warned = True
            warnings.warn(
                f"the embeddings have collapsed (spread {found['embedding_std']:.3f} of 1, effective rank "
                f"{found['embedding_rank']:.1f}); lower optim.lr, lengthen the warm-up or raise the momentum",
                stacklevel=3,
            )
        return found
