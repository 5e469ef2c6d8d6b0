"""Batch norm in groups of samples, which stands in for several GPUs."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SplitBatchNorm2d", "joined_batch_norm", "split_batch_norm"]


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm in groups of consecutive samples, as if each group were on its own GPU.

    For MoCo on one GPU (the authors' CIFAR demo): statistics over the whole batch would reveal the positive
    key to the network. Running statistics are the mean over the groups.

    Raises:
        ValueError: in training, when the batch does not divide into `splits` groups.
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


def _replace(module: nn.Module, name: str, norm: nn.Module) -> None:
    norm.load_state_dict(module.get_submodule(name).state_dict())
    setattr(module, name, norm)
