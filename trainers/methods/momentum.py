"""A network that follows another one as an exponential moving average."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["ema_update", "momentum_copy"]

Net = TypeVar("Net", bound=nn.Module)


def momentum_copy(net: Net) -> Net:
    """A deep copy without gradients; its buffers (running statistics) are its own from now on."""
    follower = copy.deepcopy(net)
    follower.requires_grad_(False)
    return follower


@torch.no_grad()
def ema_update(follower: nn.Module, leader: nn.Module, momentum: float) -> None:
    """follower = momentum * follower + (1 - momentum) * leader, parameters only."""
    mine: list[Tensor] = list(follower.parameters())
    # One fused call per device and dtype instead of one kernel per tensor.
    torch._foreach_lerp_(mine, [p.detach() for p in leader.parameters()], 1 - momentum)
