"""Who is a negative of whom, for the methods that push samples apart."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["are_kin", "log_ratio"]


def are_kin(mine: Tensor, others: Tensor) -> Tensor:
    """(B, N): whether samples (B, 2) and others (N, 2), both number and partner, are kin or the same.

    Two samples with one partner are kin, for the second views of both show it.
    """
    number, partner = mine[:, :1], mine[:, 1:]
    either = (number == others[:, 0]) | (partner == others[:, 0])
    return either | (number == others[:, 1]) | (partner == others[:, 1])


def log_ratio(query: Tensor, key: Tensor) -> Tensor:
    """ContraCAM's score (B,): q.k - log of the sum over the other rows m of exp(q.q_m), unit rows (B, D).

    As in arXiv 2108.00049, equation 2, without a temperature; the other rows give no gradient (our choice).
    """
    with torch.autocast(query.device.type, enabled=False):
        others = query @ query.detach().T
        itself = torch.eye(len(query), dtype=torch.bool, device=query.device)
        return (query * key).sum(dim=1) - others.masked_fill(itself, -torch.inf).logsumexp(dim=1)
