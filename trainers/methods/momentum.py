"""A network that follows another one as an exponential moving average, and a running centre."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from trainers.engine import ranks

__all__ = ["Centre", "ema_update", "momentum_copy"]

Net = TypeVar("Net", bound=nn.Module)


def momentum_copy(net: Net) -> Net:
    """A deep copy without gradients, with its own buffers (running statistics)."""
    follower = copy.deepcopy(net)
    follower.requires_grad_(False)
    return follower


@torch.no_grad()
def ema_update(follower: nn.Module, leader: nn.Module, momentum: float) -> None:
    """follower = momentum * follower + (1 - momentum) * leader, parameters only."""
    mine: list[Tensor] = list(follower.parameters())
    # One fused call per device and dtype instead of one kernel per tensor.
    torch._foreach_lerp_(mine, [p.detach() for p in leader.parameters()], 1 - momentum)


class Centre(nn.Module):
    """The running mean of a teacher's outputs over all ranks, subtracted from them (DINO, arXiv 2104.14294).

    The outputs of the forward pass move the centre after the step, so that a loss depends only on the state
    before it.
    """

    value: Tensor

    def __init__(self, dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(dim))
        self._noted: Tensor | None = None

    def forward(self, outputs: Tensor) -> Tensor:
        """Outputs (N, dim) of this rank, centred."""
        if self.training:
            self._noted = outputs.detach().mean(dim=0)
        return outputs - self.value

    def update(self) -> None:
        """Move by the last outputs: c = momentum * c + (1 - momentum) * their mean."""
        if self._noted is not None:
            self.value.lerp_(ranks.all_mean(self._noted), 1 - self.momentum)
            self._noted = None
