"""What surrounds the losses, worked by hand: heads, momentum networks, centre, schedules, feature maps."""

from __future__ import annotations

import pytest
import torch
from networks import SMALL, small_method, tiny_backbone, views_for
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from trainers import config as cfg
from trainers.encoders.backbones import build_backbone
from trainers.engine.optim import Clock
from trainers.methods import Method, build_method
from trainers.methods.dino import across_views
from trainers.methods.lejepa import epps_pulley
from trainers.methods.networks import (
    Centre,
    PrototypeHead,
    ema_update,
    momentum_copy,
    normalise,
    projector,
    simsiam_projector,
)  # fmt: skip
from trainers.methods.scfs import LayerHead, Stages, feature_search


def step(method: Method, clock: Clock, views: list[Tensor], rate: float = 0.1) -> Tensor:
    """One step of plain gradient descent; the losses before it."""
    method.before_step(clock)
    losses = method(views)
    method.zero_grad()
    losses.mean().backward()
    method.after_backward(clock)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.sub_(rate * parameter.grad)
    method.after_step(clock)
    return losses.detach()


@pytest.mark.parametrize("name", SMALL)
def test_a_loss_belongs_to_its_sample_scales_and_stays_in_float32_under_autocast(name: str) -> None:
    views, order = views_for(name, 4), [2, 0, 3, 1]
    scaled = {**SMALL[name].model_dump(), "loss_scale": 7.142857}
    torch.manual_seed(1)
    big = build_method(type(SMALL[name])(**scaled), tiny_backbone())
    method = small_method(name)
    method.load_state_dict(big.state_dict())
    losses = method(views)
    torch.testing.assert_close(big(views), 7.142857 * losses)
    kept = method.embedding  # of the first view, to see a collapse by
    assert len(kept) == 4
    assert not kept.requires_grad
    torch.testing.assert_close(method([view[order] for view in views]), losses[order])
    torch.testing.assert_close(method.embedding, kept[order])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = method(views)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, losses, atol=0.2, rtol=0.1)


@pytest.mark.parametrize("name", SMALL)
def test_alignment_is_greatest_for_the_same_image_and_reaches_its_pixels_by_gradient(name: str) -> None:
    method, views = small_method(name).eval(), views_for(name, 4)
    images = views[0].clone().requires_grad_()
    score = method.alignment(images, views[0])
    assert score.shape == (4,)
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert gradient.abs().sum(dim=(1, 2, 3)).gt(0).all()
    if name in ("simclr", "moco"):  # the others compare across a predictor or a centre
        assert (score > method.alignment(views[0], views[1])).all()


def test_numbers_and_sizes_of_views_that_do_not_fit_are_refused() -> None:
    first, second = views_for("simclr", 2)
    local = first[:, :, 2:, 2:]
    for name in ("simclr", "moco", "byol", "simsiam"):
        with pytest.raises(ValueError, match="2 views per sample, not 3"):
            small_method(name)([first, second, local])
    for name in ("dino", "scfs", "lejepa"):
        with pytest.raises(ValueError, match="2 global views per sample, not 1"):
            small_method(name)([first])
        with pytest.raises(ValueError, match=r"one size and the local ones another, not \[8, 6\] pixels"):
            small_method(name)([first, local])
    with pytest.raises(ValueError, match=r"set views\.locals above 0"):
        small_method("scfs")([first, second])


def test_projectors_have_the_published_shapes() -> None:
    simclr = build_method(cfg.SimCLR(output_dim=6), tiny_backbone())
    for head, layers in (
        (projector(8, None, 4, bn=True), ["Linear(8, 8)", "BatchNorm1d", "ReLU", "Linear(8, 4)"]),
        (projector(8, 16, 4, bn=False), ["Linear(8, 16)", "ReLU", "Linear(16, 4)"]),
        (projector(8, 0, 4, bn=True), ["Linear(8, 4)"]),
        (simclr.projector, ["Linear(8, 8)", "BatchNorm1d", "ReLU", "Linear(8, 6)",
                            "BatchNorm1d"]),
        (simsiam_projector(8, 6, 4), ["Linear(8, 6)", "BatchNorm1d", "ReLU", "Linear(6, 6)", "BatchNorm1d",
                                      "ReLU", "Linear(6, 4)", "BatchNorm1d"]),
    ):  # fmt: skip
        found = [type(layer).__name__ for layer in head]
        for place, layer in enumerate(head):
            if isinstance(layer, nn.Linear):
                found[place] += f"({layer.in_features}, {layer.out_features})"
        assert found == layers
    assert not list(head[-1].parameters())
    assert [name for name, _ in simclr.projector[-1].named_parameters()] == ["weight"]
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))


def test_a_momentum_copy_keeps_its_own_running_statistics() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    follower = momentum_copy(net)
    net(torch.randn(8, 2))
    ema_update(follower, net, 0.9)
    assert follower.get_buffer("1.running_mean").tolist() == [0, 0]
    assert net.get_buffer("1.running_mean").tolist() != [0, 0]


@pytest.mark.parametrize(
    ("name", "follower", "leader"),
    [
        ("byol", "target_backbone", "backbone"),
        ("byol", "target_projector", "projector"),
        ("dino", "teacher_backbone", "backbone"),
        ("dino", "teacher_head", "head"),
        ("scfs", "teacher_backbone", "backbone"),
        ("scfs", "teacher_head", "head"),
        ("scfs", "teacher_layer_heads", "layer_heads"),
    ],
)
def test_a_momentum_network_starts_as_a_copy_and_follows_by_half_a_cosine(
    name: str, follower: str, leader: str
) -> None:
    keys = {**SMALL[name].model_dump(), "momentum": 0.6}
    torch.manual_seed(1)
    method = build_method(type(SMALL[name])(**keys), tiny_backbone())
    slow, quick = method.get_submodule(follower), method.get_submodule(leader)
    expected = [p.detach().clone() for p in quick.parameters()]
    torch.testing.assert_close([p.detach() for p in slow.parameters()], expected)
    assert not any(p.requires_grad for p in slow.parameters())
    for number, share in enumerate((0.6, 0.8, 1.0)):  # of 1 - 0.4 (1 + cos) / 2 at 0, 1/2 and 1
        step(method, Clock(number, 2, 1), views_for(name, 4, seed=number))
        mine = [p.detach() for p in quick.parameters()]
        expected = [share * old + (1 - share) * new for old, new in zip(expected, mine, strict=True)]
        torch.testing.assert_close([p.detach() for p in slow.parameters()], expected)
    assert not torch.allclose(expected[0], mine[0])


def test_the_centre_is_the_running_mean_of_the_teachers_outputs_and_moves_after_the_step() -> None:
    centre = Centre(2, 0.9)
    outputs = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert torch.equal(centre(outputs), outputs)
    centre.update()
    assert centre.value.tolist() == pytest.approx([0.2, 0.4])
    torch.testing.assert_close(centre(outputs), torch.tensor([[0.8, 1.6], [2.8, 5.6]]))
    centre.update()
    assert centre.value.tolist() == pytest.approx([0.9 * 0.2 + 0.1 * 2, 0.9 * 0.4 + 0.1 * 4])
    centre.eval()(outputs)
    centre.update()
    assert centre.value.tolist() == pytest.approx([0.38, 0.76]), "evaluation leaves the centre alone"


def test_byol_adds_both_directions_against_the_target() -> None:
    method, (first, second) = small_method("byol"), views_for("byol", 4)

    def one_way(view: Tensor, other: Tensor) -> Tensor:
        guess = method.predictor(method.projector(method.backbone(view)))
        truth = method.target_projector(method.target_backbone(other))
        return (normalize(guess, dim=1) - normalize(truth, dim=1)).square().sum(dim=1)

    torch.testing.assert_close(method([first, second]), one_way(first, second) + one_way(second, first))


def test_simsiam_stops_the_gradient_at_the_target_and_keeps_the_predictors_rate() -> None:
    method, views = small_method("simsiam"), views_for("simsiam", 4)
    assert method.constant_lr == ("predictor",)
    z = [method.projector(method.backbone(view)) for view in views]
    p = [method.predictor(each) for each in z]
    fixed = [each.detach() for each in z]
    expected = -(cosine_similarity(p[0], fixed[1]) + cosine_similarity(p[1], fixed[0])) / 2
    losses = method(views)
    torch.testing.assert_close(losses, expected)
    weights = list(method.parameters())
    grads = [torch.autograd.grad(each.mean(), weights) for each in (losses, expected)]
    torch.testing.assert_close(*grads)


def dino(**keys: object) -> Method:
    torch.manual_seed(1)
    return build_method(cfg.DINO(**{**SMALL["dino"].model_dump(), **keys}), tiny_backbone())


def test_logits_of_prototypes_are_products_in_single_precision_under_autocast() -> None:
    head, features = PrototypeHead(8, 16, 6, 12), torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unit, logits = normalise(head.mlp(features)), head(features)
    assert unit.dtype == torch.float32
    assert torch.equal(logits, nn.functional.linear(unit, normalise(head.last_layer.weight)))


def test_prototypes_start_as_pytorchs_linear_layers_do_and_the_layers_before_them_small() -> None:
    head = PrototypeHead(64, 128, 256, 500)
    lengths = head.last_layer.weight.norm(dim=1)  # of 256 numbers, uniform in +- 1/16
    assert lengths.mean().item() == pytest.approx(3**-0.5, abs=0.01)
    assert head.last_layer.weight.abs().max() <= 1 / 16
    first = head.mlp[0]
    assert first.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not first.bias.any()


def test_the_prototypes_do_not_learn_in_the_first_epoch() -> None:
    method = dino(freeze_last_layer=1, momentum=0.5)
    start = method.head.last_layer.weight.detach().clone()
    for number in range(3):
        step(method, Clock(number, 3, 2), views_for("dino", 4))
        assert torch.equal(method.head.last_layer.weight, start)
    assert not torch.equal(method.head.mlp[0].weight, dino().head.mlp[0].weight)
    step(method, Clock(3, 3, 2), views_for("dino", 4))
    assert not torch.equal(method.head.last_layer.weight, start)


def test_dinos_loss_follows_centre_and_temperature() -> None:
    assert dino().encoder.get_parameter("0.weight").requires_grad is False, "the teacher is evaluated"
    method = dino(warmup_teacher_temperature=0.04, teacher_temperature=0.08, warmup_teacher_epochs=3)
    views = views_for("dino", 4)
    with torch.no_grad():
        method.centre.value.copy_(torch.linspace(-0.5, 0.5, 12))
        for epoch, temperature in ((0, 0.04), (1, 0.06), (2, 0.08), (4, 0.08)):
            method.before_step(Clock(7 * epoch, 7, 5))
            teacher = [method.teacher_head(method.teacher_backbone(view)) for view in views[:2]]
            student = [method.head(method.backbone(view)) for view in views]
            centred = (torch.stack(teacher) - torch.linspace(-0.5, 0.5, 12)) / temperature
            torch.testing.assert_close(method(views), across_views(centred, torch.stack(student) / 0.1))


def test_scfs_adds_to_dinos_loss_one_loss_per_layer_of_a_global_and_a_searching_half() -> None:
    method, views = (
        small_method("scfs").eval(),
        views_for("scfs", 3),
    )  # so that batching changes no batch norm
    plain = dino(teacher_temperature=0.07).eval()
    plain.load_state_dict(method.state_dict(), strict=False)
    with torch.no_grad():
        for layer in range(2):
            method.layer_centres[layer].get_buffer("value").copy_(torch.linspace(-0.3, 0.3, 5))
        expected = plain(views)
        for layer, depth in enumerate((1, 3)):  # after modules "0" and "2"
            teacher_maps = [method.teacher_backbone[:depth](view) for view in views[:2]]  # type: ignore[index]
            maps = [method.backbone[:depth](view) for view in views]  # type: ignore[index]
            teacher_head, head = method.teacher_layer_heads[layer], method.layer_heads[layer]
            centre = torch.linspace(-0.3, 0.3, 5)
            centred = [(teacher_head(m) - centre) / method.temperature for m in teacher_maps]
            logits = [head(m) / 0.1 for m in maps]
            terms = []
            for target, guess in ((centred[0], logits[1]), (centred[1], logits[0])):
                terms.append(-(target.softmax(1) * guess.log_softmax(1)).sum(1) / 2)
            for crop in (2, 3):
                query = maps[crop].mean(dim=(2, 3))
                found = feature_search(query[None], teacher_maps[0])[0]
                target = teacher_head(found) / method.temperature
                terms.append(-(target.softmax(1) * logits[crop].log_softmax(1)).sum(1) / 2)
            expected = expected + torch.stack(terms).sum(0) / 2
        torch.testing.assert_close(method(views), expected)


def test_the_losses_of_scfs_can_be_left_out_one_by_one_and_no_weight_stays_without_a_gradient() -> None:
    whole, views = small_method("scfs").eval(), views_for("scfs", 3)
    parts = []
    for part in ("final", "global", "search"):
        config = cfg.SCFS(**{**SMALL["scfs"].model_dump(), "losses": (part,)})
        method = build_method(config, tiny_backbone()).eval()
        method.load_state_dict(whole.state_dict(), strict=False)
        parts.append(method(views[:2] if part == "global" else views))
        parts[-1].mean().backward()
        learning = [p for p in method.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in learning)
        if part != "final":
            with_all = sum(p.requires_grad for p in whole.parameters())
            assert len(learning) < with_all
    torch.testing.assert_close(sum(parts), whole(views))


def test_the_search_gives_no_gradient_to_its_query_nor_to_the_teacher() -> None:
    method, views = small_method("scfs"), views_for("scfs", 3)
    seen: list[Tensor] = []
    method.teacher_layer_heads[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    method(views).mean().backward()
    assert len(seen) == 2
    assert not any(output.requires_grad for output in seen)
    assert all(p.grad is None for name, p in method.named_parameters() if "teacher" in name)
    assert all(p.grad is not None for name, p in method.named_parameters() if "teacher" not in name)


def test_a_layers_head_has_the_published_parts() -> None:
    head = LayerHead(512, 256, 2048, 256)
    shapes = [tuple(p.shape) for p in head.parameters() if p.ndim > 1]
    assert shapes == [(256, 512, 1, 1), (256, 256, 3, 3), (512, 256, 1, 1), (2048, 512), (256, 2048)]
    out = head(torch.randn(3, 512, 5, 5))
    assert out.norm(dim=1).tolist() == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    ("name", "channels", "sides"),
    [
        ("resnet10", [128, 256, 512], [8, 4, 2]),
        ("convnext_tiny", [192, 384, 768], [8, 4, 2]),
        ("vit_tiny_patch16_224", [192] * 3, [4] * 3),
    ],
)
def test_the_last_three_stages_of_every_kind_of_encoder_give_maps(
    name: str, channels: list[int], sides: list[int]
) -> None:
    net = build_backbone(name).eval()
    stages = Stages(net, net.stage_layers)
    assert stages.channels() == channels
    with torch.no_grad():
        pooled, maps = stages(torch.randn(2, 3, 64, 64))
    assert pooled.shape == (2, net.dim)
    shapes = [(2, count, side, side) for count, side in zip(channels, sides, strict=True)]
    assert [tuple(found.shape) for found in maps] == shapes


def test_encoders_without_known_stages_want_them_named() -> None:
    for layers, told in (
        (None, r"name the layers to search by method\.layers"),
        (("9",), "has no layer '9'"),
        (("5",), "name other layers"),
    ):
        net = tiny_backbone()
        net.stage_layers = ()
        with pytest.raises(ValueError, match=told):
            build_method(SMALL["scfs"].model_copy(update={"layers": layers}), net)


def test_zero_init_residual_makes_every_block_the_identity_and_fits_resnets_only() -> None:
    net = build_backbone("resnet10", zero_init_residual=True)
    assert not net.get_parameter("layer3.0.bn2.weight").any()
    assert build_backbone("resnet10").get_parameter("layer3.0.bn2.weight").all()
    with pytest.raises(ValueError, match="zero_init_residual fits torchvision's ResNets only"):
        build_backbone("convnext_tiny", zero_init_residual=True)


def test_lejepas_loss_is_its_formula_in_double_precision() -> None:
    method, views = small_method("lejepa").double().eval(), [view.double() for view in views_for("lejepa", 5)]
    method.directions.copy_(method._drawn(0))
    z = torch.stack([method.projector(method.backbone(view)) for view in views])
    pulled = torch.stack([(each - (z[0] + z[1]) / 2).square().mean(1) for each in z]).mean(0)
    total = torch.zeros((), dtype=torch.float64)
    t, step = torch.linspace(-3, 3, 33, dtype=torch.float64), 3 / 16
    for view in z:
        for direction in method.directions.T:
            x = view @ direction
            gap = (1j * t[:, None] * x).exp().mean(1) - (-(t**2) / 2).exp()
            integrand = gap.abs() ** 2 * (-(t**2) / 2).exp()
            total += len(x) * torch.trapezoid(integrand, dx=step)
    regulariser = total / (len(z) * method.directions.shape[1])
    torch.testing.assert_close(method(views), 0.98 * pulled + 0.02 * regulariser)


def test_the_epps_pulley_statistic_is_small_for_the_normal_law_alone() -> None:
    normal = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    constant, wide = torch.zeros(4000, 1), 3 * normal
    two = normal.sign() + 0.01 * normal  # of the same mean and variance
    assert epps_pulley(normal) < 5
    assert all(epps_pulley(other) > 100 for other in (constant, wide, two))


def test_lejepas_directions_are_unit_vectors_drawn_anew_at_every_step() -> None:
    method, found = small_method("lejepa"), []
    for number in (0, 1, 0):
        method.before_step(Clock(number, 10, 1))
        found.append(method.directions.clone())
    torch.testing.assert_close(found[0].norm(dim=0), torch.ones(12))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
