"""Optimisers, their groups of parameters, and what changes over a run as a function of where it is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainers import config as cfg

from . import ranks

__all__ = [
    "LOWER", "Clock", "Lars", "build_optimizer", "check_finite", "clip_each", "cosine", "few", "fused",
    "linear", "lr_at", "param_groups", "set_lr", "set_weight_decay",
]  # fmt: skip

LOWER = "lower optim.lr, lengthen the warm-up or set run.amp=off"
"""What to do when numbers are not finite."""
FEW = 200
"""Optimiser steps of a run that is told to be short; the demo, in which a guide gains, takes 248."""


@dataclass(frozen=True)
class Clock:
    """Where a run is: before the optimiser step number `step`, counted from 0."""

    step: int
    steps_per_epoch: int
    epochs: int

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    @property
    def epoch(self) -> int:
        """Epoch of this step, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def share(self) -> float:
        """Share of the run that lies behind, in [0, 1]."""
        return min(1.0, self.step / self.total)


def few(total: int) -> str:
    """A line for the start of a run of so many steps in all, if they are few; else empty."""
    if total >= FEW:
        return ""
    return (
        f"{total} steps in all: too few to learn much (gains of guides in docs/results.md took 434 and "
        "more); lower optim.batch or raise run.epochs"
    )


def cosine(share: float, start: float, end: float) -> float:
    """Half a cosine from `start` (share 0) to `end` (share 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def linear(epoch: int, epochs: int, start: float, end: float) -> float:
    """`start` in epoch 0, `end` from epoch `epochs - 1` on, a straight line between; `end` if epochs is 0."""
    if epoch >= epochs - 1:
        return end
    return start + (end - start) * epoch / (epochs - 1)


def lr_at(step: int, total: int, warmup: int, base: float, minimum: float = 0.0) -> float:
    """Learning rate of one step: linear warm-up to `base`, then half a cosine to `minimum` at step `total`.

    Step i < warmup, counted from 0, has base * (i + 1) / warmup, so none is lost at 0.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    return cosine(min(1.0, (step - warmup) / max(1, total - warmup)), base, minimum)


def set_lr(optimizer: Optimizer, lr: float, peak: float) -> None:
    """Give every group the rate `lr`, or `peak` if it is marked `constant_lr`, times its `lr_factor`."""
    for group in optimizer.param_groups:
        group["lr"] = (peak if group["constant_lr"] else lr) * group.get("lr_factor", 1.0)


def set_weight_decay(optimizer: Optimizer, weight_decay: float) -> None:
    """Give every group that decays at all the rate `weight_decay`."""
    for group in optimizer.param_groups:
        if group["decays"]:
            group["weight_decay"] = weight_decay


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], longest: float) -> None:
    """Shorten the gradient of every parameter to the length `longest`, each by itself, as DINO does."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    lengths = torch.stack(torch._foreach_norm(grads))  # on the device: the CPU reads no gradient's length
    torch._foreach_mul_(grads, (longest / (lengths + 1e-6)).clamp(max=1).unbind())


def check_finite(module: nn.Module, when: str, remedy: str = LOWER) -> None:
    """A FloatingPointError on all ranks if a weight or a statistic of any is not finite.

    A loss says nothing about the step that follows it: without this, a checkpoint could hold what no later
    step can repair, and push out a sound one. Waits for the device.
    """
    found = (name for name, value in module.state_dict().items() if not torch.isfinite(value).all())
    wrong = next(found, None)
    if ranks.any_rank(wrong is not None):
        raise FloatingPointError(f"{wrong or 'a weight of another rank'} is not finite {when}; {remedy}")


def param_groups(
    module: nn.Module,
    weight_decay: float,
    decay_norms: bool = False,
    constant: Collection[str] = (),
    backbone_lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Trainable parameters in groups that share weight decay, LARS adaptation and schedule.

    Biases and other 1-D parameters (norms) get neither LARS adaptation nor, unless `decay_norms`, weight
    decay. Frozen parameters (requires_grad False) are left out.

    Args:
        module: the whole method, so that its heads are included.
        constant: names of submodules whose rate ignores the schedule (SimSiam's predictor).
        backbone_lr_factor: multiplies the rate of the submodule `backbone`.
    """
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_constant = any(f"{name}.".startswith(f"{prefix}.") for prefix in constant)
            slowed = backbone_lr_factor != 1 and name.startswith("backbone.")
            groups[parameter.ndim > 1, is_constant, slowed].append(parameter)
    # Sorted, so that a checkpoint's group order does not depend on which parameter comes first.
    return [
        {
            "params": groups[is_weight, is_constant, slowed],
            "weight_decay": weight_decay if is_weight or decay_norms else 0.0,
            "decays": is_weight or decay_norms,
            "adapt": is_weight,
            "constant_lr": is_constant,
            "lr_factor": backbone_lr_factor if slowed else 1.0,
        }
        for is_weight, is_constant, slowed in sorted(groups, reverse=True)
    ]


def build_optimizer(module: nn.Module, config: cfg.Optim, constant: Collection[str] = ()) -> Optimizer:
    """The optimiser of a configuration over a module's trainable parameters, at its peak rate."""
    groups = param_groups(
        module, config.weight_decay, config.decay_norms, constant, config.backbone_lr_factor
    )
    if not groups:
        raise ValueError("the module has no trainable parameter; nothing is left to optimise")
    match config:
        case cfg.SGD():
            return fused(torch.optim.SGD, groups, lr=config.peak_lr, momentum=config.momentum)
        case cfg.LARS():
            return Lars(groups, lr=config.peak_lr, momentum=config.momentum, trust=config.trust)
        case cfg.AdamW():
            return fused(torch.optim.AdamW, groups, lr=config.peak_lr, betas=config.betas)


def fused(kind: Callable[..., Optimizer], groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    """An optimiser of torch in one kernel for many tensors, if they are on a GPU."""
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"]) or None
    optimizer = kind(groups, fused=on_gpu, **options)

    def keep_fused(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint may come from another kind of device."""
        return {**state, "param_groups": [{**group, "fused": on_gpu} for group in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(keep_fused)
    if on_gpu and isinstance(optimizer, torch.optim.SGD):
        guard_fused_sgd(optimizer)
    return optimizer


def guard_fused_sgd(optimizer: torch.optim.SGD) -> None:
    """Keep PyTorch's fused SGD from velocities that nothing was written to.

    It leaves them so if gradients overflow in the first step, and fails if a parameter gets its first
    gradient later than others. So they begin at 0, which gives the same steps. The kernel itself skips a step
    that overflows, and the host does not wait to see whether one does.
    """

    def begin(optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    begin(optimizer)
    optimizer.register_load_state_dict_post_hook(begin)


class Lars(Optimizer):
    """SGD whose step is, per tensor, a fixed share of the weights' length (You et al., arXiv 1708.03888).

        d = grad + weight_decay * w
        local = trust * |w| / (|grad| + weight_decay * |w|)     (1 where `adapt` is off or a norm is 0)
        v = momentum * v + lr * local * d
        w = w - v

    The rate is inside the velocity, as in the paper: a falling rate does not shrink past steps. `trust` is
    the paper's eta; a group may set weight_decay and adapt.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, {**defaults, "adapt": True, "constant_lr": False, "decays": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._step(group, weights, [weight.grad for weight in weights])
        return loss

    def _step(self, group: Mapping[str, Any], weights: list[Tensor], grads: list[Tensor]) -> None:
        """All tensors of a group together: one call for each operation, not one per tensor."""
        decay = group["weight_decay"]
        updates = torch._foreach_add(grads, weights, alpha=decay)
        if group["adapt"]:
            length, slope = (torch.stack(torch._foreach_norm(each)) for each in (weights, grads))
            local = group["trust"] * length / (slope + decay * length)
            # where() and not if: a comparison in Python would wait for the GPU.
            local = torch.where((length > 0) & (slope > 0), local, 1.0)
            torch._foreach_mul_(updates, local.unbind())
        for weight in weights:
            if "velocity" not in self.state[weight]:
                self.state[weight]["velocity"] = torch.zeros_like(weight)
        velocities = [self.state[weight]["velocity"] for weight in weights]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, updates, alpha=group["lr"])
        torch._foreach_sub_(weights, velocities)
