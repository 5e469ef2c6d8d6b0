"""Between backbone and loss: heads, networks that follow others, and batch norm in groups."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import _functions

from trainers.engine import ranks

__all__ = [
    "Centre", "PrototypeHead", "SplitBatchNorm2d", "SyncBatchNorm", "ema_update", "joined_batch_norm",
    "momentum_copy", "normalise", "projector", "simsiam_projector", "split_batch_norm", "synced_batch_norm",
]  # fmt: skip

Net = TypeVar("Net", bound=nn.Module)
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the name before 2.14


def projector(dim: int, hidden: int | None, output: int, bn: bool, output_bn: bool = False) -> nn.Sequential:
    """Linear, optional batch norm, ReLU, Linear: projectors, and the predictors of BYOL and SimSiam.

    Args:
        dim, hidden, output: widths; `hidden` None: `dim`; 0: a single linear layer.
        bn: batch norm after the hidden layer (SimCLR, BYOL, SimSiam; not MoCo v2 and ContrastiveCrop).
        output_bn: batch norm with a scale and no shift after the last layer (the authors' code of SimCLR).
    """
    layers: list[nn.Module] = []
    if hidden != 0:
        hidden = dim if hidden is None else hidden
        norm = [nn.BatchNorm1d(hidden)] if bn else []
        layers, dim = [nn.Linear(dim, hidden, bias=not bn), *norm, nn.ReLU(inplace=True)], hidden
    layers.append(nn.Linear(dim, output, bias=not output_bn))
    if output_bn:
        last = nn.BatchNorm1d(output)
        last.register_parameter("bias", None)
        layers.append(last)
    return nn.Sequential(*layers)


def simsiam_projector(dim: int, hidden: int, output: int) -> nn.Sequential:
    """Three times Linear and batch norm, with ReLU between; the last norm has no scale and no shift."""
    layers: list[nn.Module] = []
    for wide, narrow in ((dim, hidden), (hidden, hidden)):
        layers += [nn.Linear(wide, narrow, bias=False), nn.BatchNorm1d(narrow), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(hidden, output, bias=False), nn.BatchNorm1d(output, affine=False))


class PrototypeHead(nn.Module):
    """DINO's head: three linear layers with GELU, a unit vector, its cosines with the prototypes.

    Normalised prototypes are weight norm with lengths fixed at 1 (the code's norm_last_layer). As there, the
    layers before them start at N(0, 0.02), truncated, and the prototypes as PyTorch's linear layers do: at a
    mean length of 0.58, which says how fast they turn.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int, bn: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for wide, narrow in pairwise((dim, hidden, hidden)):
            layers += [nn.Linear(wide, narrow), *([nn.BatchNorm1d(narrow)] if bn else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, dim) -> logits (B, prototypes), float32.

        So is their product: a temperature of 0.04 would make steps of 0.1 out of those of bfloat16.
        """
        unit = normalise(self.mlp(features))
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(unit, F.normalize(self.last_layer.weight, dim=1))


def full(x: Tensor) -> Tensor:
    """At least float32: half precision is too coarse for the losses."""
    return x.float() if x.element_size() < 4 else x


def normalise(z: Tensor) -> Tensor:
    """Rows of length 1, in full precision."""
    return F.normalize(full(z), dim=1)


def momentum_copy(net: Net) -> Net:
    """A deep copy without gradients, with its own buffers (running statistics)."""
    follower = copy.deepcopy(net)
    follower.requires_grad_(False)
    return follower


@torch.no_grad()
def ema_update(follower: nn.Module, leader: nn.Module, momentum: float) -> None:
    """follower = momentum * follower + (1 - momentum) * leader, parameters only."""
    mine: list[Tensor] = list(follower.parameters())
    theirs: list[Tensor] = list(leader.parameters())
    # One fused call per device and dtype instead of one kernel per tensor.
    torch._foreach_lerp_(mine, theirs, 1 - momentum)


class Centre(nn.Module):
    """The running mean of a teacher's outputs over all ranks, subtracted from them (DINO, arXiv 2104.14294).

    The outputs of all forward passes of a step move the centre after it, so that a loss depends only on the
    state before it.
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
            # A last element counts the calls: a number that changes would recompile the forward pass.
            noted = F.pad(outputs.detach().mean(dim=0), (0, 1), value=1.0)
            self._noted = noted if self._noted is None else self._noted + noted
        return outputs - self.value

    def update(self) -> None:
        """Move by the outputs since the last update: c = momentum * c + (1 - momentum) * their mean."""
        if self._noted is not None:
            mean = self._noted[:-1] / self._noted[-1]
            self.value.lerp_(ranks.all_mean(mean), 1 - self.momentum)
            self._noted = None


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm in groups of consecutive samples, as if each group were on its own GPU.

    For MoCo on one GPU (the authors' CIFAR demo): statistics over the whole batch would reveal the positive
    key to the network. Running statistics are the mean over the groups.
    """

    def __init__(self, num_features: int, splits: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.splits = splits
        self.rate = momentum

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if len(input) % self.splits:
            raise ValueError(f"a batch of {len(input)} does not divide into {self.splits} groups (split_bn)")
        mean, var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        means, variances = mean.repeat(self.splits, 1), var.repeat(self.splits, 1)
        # Chunks and not a (B/splits, splits*C) reshape, which would copy and lose channels_last.
        output = torch.cat(
            [
                F.batch_norm(x, m, v, self.weight, self.bias, True, self.rate, self.eps)
                for x, m, v in zip(input.chunk(self.splits), means, variances, strict=True)
            ]
        )
        mean.copy_(means.mean(0))
        var.copy_(variances.mean(0))
        return output


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Replace every BatchNorm2d inside `module` by a SplitBatchNorm2d with the same parameters, in place."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            rate = 0.1 if child.momentum is None else child.momentum
            _replace(module, name, SplitBatchNorm2d(child.num_features, splits, child.eps, rate))
        else:
            split_batch_norm(child, splits)


def joined_batch_norm(module: nn.Module) -> None:
    """Undo `split_batch_norm` in place, for training without negatives."""
    for name, child in module.named_children():
        if isinstance(child, SplitBatchNorm2d):
            _replace(module, name, nn.BatchNorm2d(child.num_features, child.eps, child.rate))
        else:
            joined_batch_norm(child)


class SyncBatchNorm(nn.SyncBatchNorm):
    """PyTorch's batch norm over all processes, without its wait of the host in every layer.

    PyTorch leaves out processes whose batch is empty; the host waits for the device to know how many stay. No
    batch is empty here. Statistics and gradients are the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or ranks.world() == 1 or self.momentum is None:
            return super().forward(input)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return cast(Tensor, _OverRanks.apply(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum,
        ))  # type: ignore[no-untyped-call]  # fmt: skip


class _OverRanks(_functions.SyncBatchNorm):
    """Only the forward pass differs; the backward pass is PyTorch's."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
        var: Tensor | None, eps: float, momentum: float,
    ) -> Tensor:  # fmt: skip
        if not input.is_contiguous(memory_format=torch.channels_last):
            input = input.contiguous()
        own_mean, own_inverse = torch.batch_norm_stats(input, eps)
        count = own_mean.new_full((1,), input.numel() // input.shape[1])
        own = torch.cat([own_mean, own_inverse, count])
        everyone = own.new_empty(ranks.world() * len(own))
        _gather(everyone, own)
        means, inverses, counts = torch.split(everyone.view(-1, len(own)), input.shape[1], dim=1)
        total = torch.batch_norm_gather_stats_with_counts(
            input, means, inverses, mean, var, momentum, eps, counts.flatten()
        )
        ctx.save_for_backward(input, weight, *total, counts.int())
        ctx.process_group = dist.group.WORLD
        return torch.batch_norm_elemt(input, weight, bias, *total, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # Without those of the group and its size, which are arguments in PyTorch.
        return tuple(_functions.SyncBatchNorm.backward(ctx, gradient)[:7])  # type: ignore[no-untyped-call]


def synced_batch_norm(module: Net) -> Net:
    """The module, or one in its place, with batch norm over all processes; its parameters stay."""
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    for part in synced.modules():
        if type(part) is nn.SyncBatchNorm:
            part.__class__ = SyncBatchNorm
    return cast(Net, synced)


def _replace(module: nn.Module, name: str, norm: nn.Module) -> None:
    norm.load_state_dict(module.get_submodule(name).state_dict())
    setattr(module, name, norm)
