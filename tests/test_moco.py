"""MoCo: its queue, its key encoder and the batch norm in groups that keeps the answer from leaking."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from networks import tiny_backbone, views_for
from torch import Tensor, nn

from trainers import config as cfg
from trainers.engine.optim import Clock
from trainers.methods import build_method
from trainers.methods.moco import MoCo
from trainers.methods.networks import SplitBatchNorm2d, joined_batch_norm, normalise, split_batch_norm


def moco(norm: bool = False, **keys: Any) -> MoCo:
    keys = {"hidden_dim": 0, "output_dim": 4, "queue": 10, **keys}
    method = build_method(cfg.MoCo(**keys), tiny_backbone(norm))
    assert isinstance(method, MoCo)
    return method


def test_the_queue_overwrites_its_oldest_keys_for_any_batch_size() -> None:
    method = moco()
    oldest = method.queue.clone()
    expected = oldest.clone()
    place = 0
    for rows in (4, 4, 4, 10, 3, 23):
        keys = torch.randn(rows, 4)
        for key in keys:
            expected[place] = key
            place = (place + 1) % 10
        method.enqueue(keys)
        assert torch.equal(method.queue, expected)
        assert int(method.pointer) == place


def test_a_step_enqueues_the_keys_after_backward_and_moves_the_key_encoder() -> None:
    method = moco(momentum=0.75, symmetric=True)
    views = views_for("moco", 3)
    before = method.queue.clone()
    losses = method(views)
    assert torch.equal(method.queue, before)
    losses.mean().backward()
    with torch.no_grad():
        key = method.key_backbone.get_parameter("0.weight").clone()
        # The second view is key first.
        keys = normalise(method.key_projector(method.key_backbone(torch.cat(views[::-1]))))
        query = method.backbone.get_parameter("0.weight")
        query.add_(1.0)
    method.after_step(Clock(0, 10, 1))
    torch.testing.assert_close(method.queue[:6], keys)
    assert torch.equal(method.queue[6:], before[6:])
    torch.testing.assert_close(method.key_backbone.get_parameter("0.weight"), 0.75 * key + 0.25 * query)
    assert all(p.grad is None and not p.requires_grad for p in method.key_backbone.parameters())


def test_the_queue_knows_whose_its_keys_are_and_leaves_kin_out() -> None:
    method, views = moco(queue=4), views_for("moco", 2)
    kin = torch.tensor([[3, 4], [5, 5]])
    method(views, kin)
    method.after_step(Clock(0, 2, 1))
    assert method.queue_kin.tolist() == [[3, 4], [5, 5], [-1, -1], [-1, -1]]
    told, untold = method(views, kin), method(views)
    assert (told < untold).all(), "every query's own older key was among the negatives"
    strangers = torch.tensor([[8, 8], [9, 9]])
    torch.testing.assert_close(method(views, strangers), untold)


def test_symmetric_moco_adds_the_two_directions_and_evaluation_enqueues_nothing() -> None:
    views = views_for("moco", 3)
    both, one = moco(symmetric=True).eval(), moco().eval()
    one.load_state_dict(both.state_dict())
    forth, back = one(views), one(views[::-1])
    torch.testing.assert_close(both(views), forth + back)
    before = one.queue.clone()
    one.after_step(Clock(0, 1, 1))
    assert torch.equal(one.queue, before), "evaluation leaves the queue alone"


def test_split_batch_norm_equals_one_batch_norm_per_group() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3))
    parts = [nn.BatchNorm2d(3) for _ in range(4)]
    split_batch_norm(net, 4)
    assert isinstance(net[0], SplitBatchNorm2d)
    x = torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last)
    expected = torch.cat([part(rows) for part, rows in zip(parts, x.chunk(4), strict=True)])
    output = net(x)
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous(memory_format=torch.channels_last)
    means = torch.stack([cast(Tensor, part.running_mean) for part in parts])
    torch.testing.assert_close(net[0].running_mean, means.mean(0))
    torch.testing.assert_close(
        net.eval()(x), nn.functional.batch_norm(x, net[0].running_mean, net[0].running_var)
    )
    with pytest.raises(ValueError, match="does not divide into 4 groups"):
        net.train()(x[:6])


def test_joined_batch_norm_undoes_the_split_and_takes_any_batch() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    whole = copy.deepcopy(net)
    split_batch_norm(net, 4)
    joined_batch_norm(net)
    assert not any(isinstance(module, SplitBatchNorm2d) for module in net.modules())
    images = torch.randn(7, 3, 5, 5)
    assert torch.equal(net(images), whole(images))
    torch.testing.assert_close(net.state_dict(), whole.state_dict(), atol=0, rtol=0)


def test_split_keys_are_encoded_in_mixed_groups_and_come_back_in_order() -> None:
    method = moco(norm=True, split_bn=2, queue=16)
    images = views_for("moco", 8)[0]
    keys = [method._keys(images, seed) for seed in range(20)]
    assert any(not torch.allclose(keys[0], other) for other in keys[1:]), "groups should differ between steps"
    assert torch.equal(keys[0], method._keys(images, 0)), "the mix is a function of the step"
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    mixed = normalise(method.key_projector(method.key_backbone(images[order])))
    assert torch.equal(keys[3], mixed[torch.argsort(order)])
    method.eval()  # with running statistics grouping is moot, so any order must give the plain keys
    plain = nn.functional.normalize(method.key_projector(method.key_backbone(images)), dim=1)
    torch.testing.assert_close(method._keys(images, 3), plain)
