"""Batch norm over processes, without PyTorch's wait of the host in every layer.

PyTorch has its kernels for GPUs only. Here formulas stand in for them, so that two processes compute.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import without_waiting
from networks import tiny_backbone
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.modules import _functions
from torch.utils._python_dispatch import TorchDispatchMode

from trainers.engine import ranks
from trainers.methods.networks import SyncBatchNorm, _OverRanks, synced_batch_norm


def over(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def along(x: Tensor, values: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.ndim - 2))


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.mean(over(x)), (x.var(over(x), correction=0) + eps).rsqrt()


def joined(
    x: Tensor,
    means: Tensor,
    inverses: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    eps: float,
    n: Tensor,
) -> tuple[Tensor, Tensor]:
    n = n[:, None]
    centre = (n * means).sum(0) / n.sum()
    spread = (n * (inverses**-2 - eps + (means - centre) ** 2)).sum(0) / n.sum()
    mean.lerp_(centre, momentum)
    var.lerp_(spread * n.sum() / (n.sum() - 1), momentum)
    return centre, (spread + eps).rsqrt()


def normalised(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> Tensor:
    return (x - along(x, mean)) * along(x, inverse * weight) + along(x, bias)


def sums(
    dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, *wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second = dy.sum(over(x)), (dy * (x - along(x, mean))).sum(over(x))
    return first, second, second * inverse, first.clone()


def slope(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    n: Tensor,
) -> Tensor:
    first, second = first / n.sum(), second / n.sum()
    return (dy - along(x, first) - (x - along(x, mean)) * along(x, inverse**2 * second)) * along(
        x, inverse * weight
    )


KERNELS = {
    "batch_norm_stats": statistics,
    "batch_norm_gather_stats_with_counts": joined,
    "batch_norm_elemt": normalised,
    "batch_norm_backward_reduce": sums,
    "batch_norm_backward_elemt": slope,
}


class Waits(TorchDispatchMode):
    """Names the operators whose result, or its size, the host must know."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = "index" in str(func) and args[1][0].dtype is torch.bool
        if by_mask or torch.Tag.data_dependent_output in func.tags:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def layers() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5)
    )
    nn.init.normal_(net.get_parameter("1.weight"))
    return net.double()


def images() -> Tensor:
    return torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1)).double()


def learn(net: nn.Module, rows: slice) -> dict[str, Any]:
    x = images()[rows].requires_grad_()
    y = net(x)
    (
        torch.arange(30.0).view(6, 5)[rows] * y**2
    ).sum().backward()  # a plain sum of squares would have no gradient
    return {
        "y": y.detach(),
        "x": x.grad,
        "buffers": list(net.buffers()),
        "gradients": [p.grad for p in net.parameters()],
    }


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    kernels = torch.library.Library("aten", "IMPL")
    for name, kernel in KERNELS.items():
        kernels.impl(name, kernel, "CPU")
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    with Waits() as waits:
        found = learn(synced_batch_norm(layers()), slice(3 * rank, 3 * rank + 3))
    with Waits() as theirs:
        norm = nn.BatchNorm2d(3).double()
        group, settings = dist.group.WORLD, (norm.running_mean, norm.running_var, 1e-5, 0.1)
        _functions.SyncBatchNorm.apply(images(), norm.weight, norm.bias, *settings, group, 2)
    torch.save({**found, "waits": waits.found, "theirs": theirs.found}, f"{folder}/{rank}.pt")
    ranks.cleanup()


def test_two_processes_normalise_as_one_with_the_joined_batch_and_never_wait(tmp_path: Path) -> None:
    start_processes(one_rank, args=(str(tmp_path),), nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = learn(layers(), slice(0, 6))
    for name in ("y", "x"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), alone[name], atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(first["buffers"], alone["buffers"], atol=1e-12, rtol=1e-9)
    both = [one + other for one, other in zip(first["gradients"], second["gradients"], strict=True)]
    torch.testing.assert_close(both, alone["gradients"], atol=1e-12, rtol=1e-9)
    assert first["waits"] == []
    assert first["theirs"], "PyTorch's own batch norm waits no more: ours can go"


def test_conversion_keeps_parameters_and_what_evaluation_gives_and_reaches_every_layer() -> None:
    net = tiny_backbone(norm=True)
    plain = copy.deepcopy(net).eval()
    synced = synced_batch_norm(net)
    assert [type(part) for part in synced.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)] == [
        SyncBatchNorm
    ]
    assert list(synced.state_dict()) == list(plain.state_dict())
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(synced.eval()(x), plain(x))


@pytest.mark.gpu
def test_on_a_gpu_it_is_batch_norm_without_a_wait(tmp_path: Path) -> None:
    dist.init_process_group("nccl", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        norm = nn.BatchNorm2d(3).cuda()
        other = copy.deepcopy(norm)
        settings = (norm.weight, norm.bias, norm.running_mean, norm.running_var, 1e-5, 0.1)
        found = []
        for _ in range(2):  # the first collective connects
            x = images().float().cuda().requires_grad_()
            with without_waiting("gpu"):
                y = _OverRanks.apply(x, *settings)  # type: ignore[no-untyped-call]
                (y**3).sum().backward()
            found.append((y, x.grad))
        for y, gradient in found:
            x = images().float().cuda().requires_grad_()
            expected = other(x)
            (expected**3).sum().backward()
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(gradient, x.grad)
        torch.testing.assert_close(norm.running_var, other.running_var)
    finally:
        ranks.cleanup()
