"""Parameter groups, LARS against its formula, and the schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainers.config import LARS, SGD, AdamW
from trainers.engine.optim import (
    Lars,
    build_optimizer,
    clip_each,
    guard_fused_sgd,
    lr_at,
    param_groups,
    set_lr,
)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_the_schedule_warms_up_without_a_lost_step_and_ends_at_the_minimum() -> None:
    rates = [lr_at(step, 30, 10, 0.5, 0.05) for step in range(10)]
    assert rates == pytest.approx([step / 20 for step in range(1, 11)])
    assert lr_at(1000, 30, 10, 0.5, 0.05) == pytest.approx(0.05)
    optimizer = torch.optim.SGD(small_net().parameters(), lr=0.5)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.05)
    for step in range(10, 31):
        assert lr_at(step, 30, 10, 0.5, 0.05) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_one_dimensional_parameters_get_neither_decay_nor_adaptation() -> None:
    net = small_net()
    net[2].weight.requires_grad_(False)
    groups = param_groups(net, 0.1)
    decayed = [group for group in groups if group["weight_decay"]]
    assert [p is net[0].weight for group in decayed for p in group["params"]] == [True]
    assert [(group["adapt"], len(group["params"])) for group in groups] == [(True, 1), (False, 4)]
    assert [group["weight_decay"] for group in param_groups(net, 0.1, decay_norms=True)] == [0.1, 0.1]


def test_a_constant_group_keeps_its_peak_rate() -> None:
    optimizer = build_optimizer(small_net(), SGD(lr=1.0), constant=("2",))
    set_lr(optimizer, 0.25, peak=1.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    net_rates = sorted(rates.values())
    assert net_rates == [0.25] * 4 + [1.0] * 2


def test_lars_follows_its_formula_for_weights_and_plain_momentum_for_biases() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    bias = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "adapt": False}]
    optimizer = Lars(groups, lr=1.0, momentum=0.9, trust=0.02)
    w, b, v, u = [3.0, 4.0], 2.0, [0.0, 0.0], 0.0
    for lr, grad, slope in ((1.0, [6.0, 8.0], 0.5), (0.5, [1.0, -2.0], -1.0), (0.1, [0.0, 0.0], 0.0)):
        for group in optimizer.param_groups:
            group["lr"] = lr
        weight.grad = torch.tensor([grad], dtype=torch.float64)
        bias.grad = torch.tensor([slope], dtype=torch.float64)
        optimizer.step()
        length, steep = math.hypot(*w), math.hypot(*grad)
        local = 0.02 * length / (steep + 0.1 * length) if steep > 0 else 1.0
        v = [0.9 * v[i] + lr * local * (grad[i] + 0.1 * w[i]) for i in range(2)]
        w = [w[i] - v[i] for i in range(2)]
        u = 0.9 * u + lr * slope
        b -= u
        assert weight.tolist()[0] == pytest.approx(w, abs=1e-12)
        assert bias.item() == pytest.approx(b, abs=1e-12)


class Calls(TorchDispatchMode):
    """Counts the operators that are called inside, and those for which the host would wait for a GPU."""

    number = waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_of_lars_and_clipping_call_as_many_operators_for_many_tensors_as_for_few() -> None:
    found = []
    for layers in (2, 9):
        net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
        optimizer = build_optimizer(net, LARS(lr=1.0))
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        with Calls() as steps:
            optimizer.step()
        with Calls() as clips:
            clip_each(net.parameters(), 1.0)
        found.append((steps.number, clips.number))
    assert found[0] == found[1]


def test_clipping_shortens_each_gradient_by_itself_and_leaves_short_ones() -> None:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.4])
    clip_each(parameters, 5.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([3.0, 4.0]))
    assert parameters[1].grad.tolist() == torch.tensor([0.3, 0.4]).tolist()


@pytest.mark.parametrize("config", [SGD(), AdamW()])
def test_a_checkpoint_of_a_gpu_is_continued_on_the_cpu_and_no_optimiser_changes_its_kind(config: Any) -> None:
    """On a GPU the optimisers are fused, and their numbers of steps lie there."""
    nets = [small_net() for _ in range(2)]
    kind = torch.optim.AdamW if isinstance(config, AdamW) else torch.optim.SGD
    optimizers = [build_optimizer(net, config) for net in nets]
    there = kind([{**group, "fused": True} for group in optimizers[0].param_groups])
    for step in range(3):
        for net, optimizer in zip(nets, (there if step < 2 else optimizers[0], optimizers[1]), strict=True):
            if step == 2 and net is nets[0]:
                optimizer.load_state_dict(there.state_dict())
            optimizer.zero_grad()
            net(torch.ones(4, 3) + torch.arange(4.0)[:, None]).square().mean().backward()
            optimizer.step()
    assert [group["fused"] for group in optimizers[0].param_groups] == [None, None]
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("restored", [False, True])
def test_a_fused_sgd_takes_the_steps_of_a_plain_one_although_gradients_overflow_or_come_later(
    restored: bool,
) -> None:
    """PyTorch's has undefined velocities then, or fails."""
    nets, steps = [small_net() for _ in range(2)], []
    for net, fused in zip(nets, (True, None), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=fused)
        if fused:
            guard_fused_sgd(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        for step in range(6):
            images = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            scaler.scale(net(images).square().mean()).backward()
            if step == 0:
                net.get_parameter("0.bias").grad.fill_(math.inf)
            if step < 3:
                net.get_parameter("2.weight").grad = None
            with Calls() as calls:
                scaler.step(optimizer)
            assert not (fused and calls.waits)
            scaler.update(1.0)
            steps.append([parameter.detach().clone() for parameter in net.parameters()])
            if restored and step == 2:
                state = optimizer.state_dict()
                state["state"].pop(4, None)  # as one that has had no gradient yet
                optimizer.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(steps[0], small_net().parameters(), strict=True)), "skipped"
    for ours, plain in zip(steps[:6], steps[6:], strict=True):
        torch.testing.assert_close(ours, plain)


def test_lars_restored_in_the_middle_goes_on_as_if_never_stopped() -> None:
    torch.manual_seed(1)
    config, data = LARS(lr=5.0), torch.randn(10, 8, 3)

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> None:
        for x in rows:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    whole = small_net()
    train(whole, build_optimizer(whole, config), data)
    first, second = small_net(), small_net()
    optimizer = build_optimizer(first, config)
    train(first, optimizer, data[:4])
    second.load_state_dict(first.state_dict())
    restored = build_optimizer(second, config)
    restored.load_state_dict(optimizer.state_dict())
    train(second, restored, data[4:])
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(whole.get_parameter("0.weight"), small_net().get_parameter("0.weight"))


def test_a_module_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(small_net().requires_grad_(False), SGD())
