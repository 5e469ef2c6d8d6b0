"""Losses against their formulas, queue and EMA by hand, and two processes against one."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from trainers import config as cfg
from trainers import distributed
from trainers.backbones import Backbone
from trainers.methods import Method, build_method
from trainers.methods.heads import normalise, projector
from trainers.methods.moco import MoCo, info_nce
from trainers.methods.momentum import ema_update, momentum_copy
from trainers.methods.simclr import nt_xent
from trainers.methods.split_bn import SplitBatchNorm2d, split_batch_norm
from trainers.schedules import Clock


def tiny_backbone(norm: bool = False) -> Backbone:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, stride=2)]
    if norm:
        layers.append(nn.BatchNorm2d(8))
    net: Any = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.dim, net.feature_layer = 8, "0"
    return cast(Backbone, net)


def two_views_of(samples: int, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(samples, 3, size, size, generator=generator) for _ in range(2)]


def moco(norm: bool = False, **keys: Any) -> MoCo:
    keys = {"hidden_dim": 0, "output_dim": 4, "queue": 10, **keys}
    method = build_method(cfg.MoCo(**keys), tiny_backbone(norm))
    assert isinstance(method, MoCo)
    return method


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_the_formula_in_a_plain_loop(temperature: float) -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 6, dtype=torch.float64)
    z = [row / row.norm() for row in [*first, *second]]
    expected = [0.0] * 5
    for i in range(10):
        others = [math.exp(float(z[i] @ z[k]) / temperature) for k in range(10) if k != i]
        positive = math.exp(float(z[i] @ z[(i + 5) % 10]) / temperature)
        expected[i % 5] += -math.log(positive / sum(others)) / 2
    assert nt_xent(first, second, temperature).tolist() == pytest.approx(expected, abs=1e-12)
    assert nt_xent(first.float(), second.float(), temperature).tolist() == pytest.approx(expected, rel=1e-5)


def test_info_nce_equals_the_formula_in_a_plain_loop() -> None:
    torch.manual_seed(0)
    query, key, queue = (nn.functional.normalize(torch.randn(n, 6).double(), dim=1) for n in (4, 4, 9))
    expected = []
    for q, k in zip(query, key, strict=True):
        positive = math.exp(float(q @ k) / 0.2)
        expected.append(-math.log(positive / (positive + sum(math.exp(float(q @ n) / 0.2) for n in queue))))
    assert info_nce(query, key, queue, 0.2).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_gradients_of_both_losses_are_right() -> None:
    torch.manual_seed(0)
    a, b, queue = torch.randn(3, 3, 4, dtype=torch.float64)
    a.requires_grad_()
    b.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: nt_xent(x, y, 0.5), (a, b))
    assert torch.autograd.gradcheck(lambda q: info_nce(q, b.detach(), queue, 0.5), (a,))


def test_under_autocast_the_losses_stay_in_float32() -> None:
    for config in (cfg.SimCLR(hidden_dim=8), cfg.MoCo(queue=16)):
        method = build_method(config, tiny_backbone())
        views = two_views_of(4)
        plain = method(views)
        method.load_state_dict(method.state_dict())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = method(views)
        assert mixed.dtype == torch.float32
        assert mixed.shape == (4,)
        torch.testing.assert_close(mixed, plain, atol=0.15, rtol=0.1)


def test_loss_scale_multiplies_the_loss_and_other_numbers_of_views_are_refused() -> None:
    views = two_views_of(4)
    losses = []
    for scale in (1.0, 7.142857):
        torch.manual_seed(3)
        losses.append(build_method(cfg.SimCLR(bn=False, loss_scale=scale), tiny_backbone())(views))
    torch.testing.assert_close(losses[1], 7.142857 * losses[0])
    with pytest.raises(ValueError, match="2 views per sample, not 3"):
        build_method(cfg.SimCLR(), tiny_backbone())([*views, views[0]])


@pytest.mark.parametrize(
    ("hidden", "bn", "kinds"),
    [
        (None, True, ["Linear", "BatchNorm1d", "ReLU", "Linear"]),
        (512, False, ["Linear", "ReLU", "Linear"]),
        (0, True, ["Linear"]),
    ],
)
def test_projectors_have_the_published_shapes(hidden: int | None, bn: bool, kinds: list[str]) -> None:
    head = projector(8, hidden, 4, bn)
    assert [type(layer).__name__ for layer in head] == kinds
    assert head[0].out_features == (4 if hidden == 0 else hidden or 8)
    assert head(torch.randn(3, 8)).shape == (3, 4)


def test_the_queue_overwrites_its_oldest_keys_for_any_batch_size() -> None:
    method = moco()
    oldest = method.queue.clone()
    expected = oldest.clone()
    counter, place = 0, 0
    for rows in (4, 4, 4, 10, 3, 23):
        keys = torch.arange(counter, counter + rows).float()[:, None].expand(rows, 4)
        counter += rows
        for key in keys:
            expected[place] = key
            place = (place + 1) % 10
        method.enqueue(keys)
        assert torch.equal(method.queue, expected)
        assert int(method.pointer) == place


def test_a_step_enqueues_the_keys_after_backward_and_moves_the_key_encoder() -> None:
    method = moco(momentum=0.75, symmetric=True)
    views = two_views_of(3)
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


def test_symmetric_moco_adds_the_two_directions() -> None:
    views = two_views_of(3)
    both, one = moco(symmetric=True), moco()
    one.load_state_dict(both.state_dict())
    forth, back = one(views), one(views[::-1])
    torch.testing.assert_close(both(views), forth + back)


def test_evaluation_leaves_the_queue_alone() -> None:
    method = moco().eval()
    before = method.queue.clone()
    method(two_views_of(3))
    method.after_step(Clock(0, 1, 1))
    assert torch.equal(method.queue, before)


def test_a_momentum_copy_keeps_its_own_running_statistics() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    follower = momentum_copy(net)
    net(torch.randn(8, 2))
    with torch.no_grad():
        net.get_parameter("0.weight").fill_(2.0)
        follower.get_parameter("0.weight").fill_(1.0)
    ema_update(follower, net, 0.9)
    torch.testing.assert_close(follower.get_parameter("0.weight"), torch.full((2, 2), 1.1))
    assert follower.get_buffer("1.running_mean").tolist() == [0, 0]
    assert net.get_buffer("1.running_mean").tolist() != [0, 0]


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


def test_split_keys_are_encoded_in_mixed_groups_and_come_back_in_order() -> None:
    method = moco(norm=True, split_bn=2, queue=16)
    images = two_views_of(8)[0]
    keys = [method._keys(images, seed) for seed in range(20)]
    assert any(not torch.allclose(keys[0], other) for other in keys[1:]), "groups should differ between steps"
    assert torch.equal(keys[0], method._keys(images, 0)), "the mix is a function of the step"
    method.eval()  # with running statistics grouping is moot, so any order must give the plain keys
    plain = nn.functional.normalize(method.key_projector(method.key_backbone(images)), dim=1)
    torch.testing.assert_close(method._keys(images, 3), plain)


def test_moco_resumed_from_its_state_goes_on_as_if_never_stopped() -> None:
    def run(method: MoCo, steps: range) -> list[float]:
        losses = []
        for step in steps:
            clock = Clock(step, 6, 1)
            method.before_step(clock)
            loss = method(two_views_of(8)).mean()
            losses.append(loss.item())
            method.zero_grad()
            loss.backward()
            with torch.no_grad():
                for p in method.parameters():
                    if p.grad is not None:
                        p.sub_(0.1 * p.grad)
            method.after_step(clock)
        return losses

    whole = run(moco(norm=True, split_bn=2, momentum=0.9), range(6))
    first = moco(norm=True, split_bn=2, momentum=0.9)
    start = run(first, range(3))
    torch.manual_seed(99)
    second = moco(norm=True, split_bn=2, momentum=0.9)
    second.load_state_dict(first.state_dict())
    assert start + run(second, range(3, 6)) == whole
    assert len(set(whole)) == 6


WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.25])


def simclr() -> Method:
    torch.manual_seed(1)
    return build_method(cfg.SimCLR(bn=False), tiny_backbone())


def gradients(method: Method) -> list[Tensor]:
    return [p.grad for p in method.parameters() if p.grad is not None]


def train_on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(2 * rank, 2 * rank + 2)
    views = [view[rows] for view in two_views_of(4)]
    found: dict[str, Any] = {"rows": distributed.gather_rows(torch.full((rank,), 7))}
    for name, method in (("simclr", simclr()), ("moco", moco(symmetric=True))):
        parallel = DistributedDataParallel(method)  # named, for its hooks die with it
        losses = parallel(views)
        (WEIGHTS[rows] * losses).mean().backward()
        method.after_step(Clock(0, 1, 1))
        found[name] = {"losses": losses.detach(), "gradients": gradients(method)}
        found[name]["mean"] = distributed.all_mean(losses.mean())
    assert isinstance(method, MoCo)
    found["queue"] = method.queue
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.cleanup()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(train_on_one_rank, args=(str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ["simclr", "moco"])
def test_two_ranks_have_the_loss_and_gradient_of_one_with_the_joined_batch(
    ranks: list[dict[str, Any]], name: str
) -> None:
    method = simclr() if name == "simclr" else moco(symmetric=True)
    losses = method(two_views_of(4))
    (WEIGHTS * losses).mean().backward()
    torch.testing.assert_close(torch.cat([rank[name]["losses"] for rank in ranks]), losses.detach())
    for rank in ranks:
        torch.testing.assert_close(rank[name]["gradients"], gradients(method), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(rank[name]["mean"], losses.detach().mean())


def test_two_ranks_have_the_queue_of_one_and_gather_unequal_numbers_of_rows(
    ranks: list[dict[str, Any]],
) -> None:
    method = moco(symmetric=True)
    method(two_views_of(4))
    method.after_step(Clock(0, 1, 1))
    for rank in ranks:
        torch.testing.assert_close(rank["queue"], method.queue)
        assert rank["rows"].tolist() == [7]


def test_without_a_process_group_everything_is_the_only_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.init("cpu") == torch.device("cpu")
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    x = torch.ones(2, requires_grad=True)
    assert distributed.gather_with_grad(x) is x
    assert not distributed.gather(x).requires_grad
    with pytest.raises(ValueError, match="should be gpu or cpu"):
        distributed.init("tpu")
