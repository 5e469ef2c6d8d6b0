"""Feature taps, and heatmaps from features and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from conftest import on, without_waiting
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

from dali_views.maps.boxes import boxes_from_maps
from dali_views.maps.heatmap import (
    activation_map,
    activations,
    feature_grid,
    gradient_map,
    heatmaps,
    principal_map,
)
from dali_views.maps.tap import FeatureTap

WHOLE = [0.0, 0.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = resnet18(num_classes=4)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)))


# ---- taps


def test_a_tap_holds_the_output_of_the_named_layer_with_its_graph_and_leaves_no_hook_behind(
    resnet: nn.Module, images: Tensor
) -> None:
    resnet.eval()
    layer = resnet.get_submodule("layer4")
    with FeatureTap(resnet, "layer4") as tap:
        assert len(layer._forward_hooks) == 1
        logits = resnet(images)
    assert tap.features.shape == (2, 512, 2, 2)
    assert tap.features.requires_grad
    assert len(layer._forward_hooks) == 0
    torch.testing.assert_close(resnet.get_submodule("fc")(tap.features.mean((2, 3))), logits)


@pytest.mark.parametrize("layer", ["2.0", "_orig_mod.2.0"])
def test_a_tap_put_on_a_compiled_model_before_its_first_call_sees_every_call(
    layer: str, images: Tensor
) -> None:
    torch.compiler.reset()  # or it takes the graph of an equal network that was compiled without a tap
    net = small_net().eval()
    model = cast(nn.Module, torch.compile(net, backend="eager"))
    with FeatureTap(model, layer) as tap:
        with pytest.raises(RuntimeError, match=f"'{layer}' has not run"):
            _ = tap.features
        for batch in (images, images + 1):
            model(batch)
            with FeatureTap(net, "2.0") as plain:
                net(batch)
            torch.testing.assert_close(tap.features, plain.features)


def test_an_unknown_layer_is_refused_with_the_nearest_names_or_else_its_parts(resnet: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"ResNet has no layer 'layr4'; .*\blayer4\b"):
        FeatureTap(resnet, "layr4")
    with pytest.raises(ValueError, match=r"its parts are 0, 1, 2 \(2\.0 to 2\.1\)"):
        FeatureTap(small_net(), "zzzzzzzz")
    with pytest.raises(ValueError, match=r"stages \(stages\.0 to stages\.3\)"):
        FeatureTap(timm.create_model("convnext_atto"), "layer4")


class Returns(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        outputs = {"tuple": (None, x + 1, x), "mapping": {"logits": x + 1, "other": x}, "nothing": ("a",)}
        return outputs[self.kind]


def test_the_first_tensor_of_a_composite_output_is_kept_and_an_output_without_one_refused() -> None:
    for kind in ("tuple", "mapping"):
        model = nn.Sequential(Returns(kind))
        with FeatureTap(model, "0") as tap:
            model(torch.zeros(2))
        assert tap.features.tolist() == [1, 1]
    model = nn.Sequential(Returns("nothing"))
    with FeatureTap(model, "0"), pytest.raises(TypeError, match="'0' returned no tensor"):
        model(torch.zeros(2))


# ---- maps


def test_an_activation_map_is_the_min_max_of_the_channel_sum() -> None:
    features = torch.zeros(2, 3, 2, 2)
    features[0, :, 0, 1] = torch.tensor([1.0, 2, 3])
    features[0, 1, 1, 0] = 3
    features[1] = torch.arange(4.0).view(2, 2) + 7
    maps = activation_map(features)
    assert maps[0].tolist() == [[0, 1], [0.5, 0]]
    torch.testing.assert_close(maps[1], torch.arange(4.0).view(2, 2) / 3)


def test_activations_are_summed_in_single_precision_or_lengths_where_values_are_negative() -> None:
    maps = torch.full((2, 64, 2, 2), 6e4, dtype=torch.float16)
    maps[0, :, 0, 1] = 0.5
    maps[1, :, 0, 1] = -0.5
    summed = [[64 * 6e4, 32.0], [64 * 6e4, 64 * 6e4]]
    lengths = [[8 * 6e4, 4.0], [8 * 6e4, 8 * 6e4]]
    expected = torch.tensor([summed, lengths])  # each image by itself: sum if nothing is negative
    torch.testing.assert_close(activations(maps), expected, rtol=1e-6, atol=0)


def test_channels_that_cancel_do_not_hide_an_object_of_signed_features() -> None:
    direction = F.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)
    direction -= direction.mean()  # as after a layer norm
    features = 0.1 * torch.randn(1, 32, 6, 6, generator=torch.Generator().manual_seed(1))
    features -= features.mean(1, keepdim=True)
    features[:, :, 2:4, 1:5] += 5 * direction[:, None, None]
    assert features.sum(1).abs().max() < 1e-4
    expected = torch.tensor([[2 / 6, 1 / 6, 4 / 6, 5 / 6]])
    for read in (activation_map, principal_map):
        torch.testing.assert_close(boxes_from_maps(read(features), 0.5), expected)


def test_a_principal_map_is_the_first_component_of_the_singular_values_towards_the_middle() -> None:
    draw = torch.Generator().manual_seed(2)
    features = torch.randn(5, 7, 4, 5, generator=draw) + 4 * torch.rand(5, 1, 4, 5, generator=draw)
    maps = principal_map(features)
    points = features.flatten(2).double() - features.flatten(2).double().mean(2, keepdim=True)
    _, values, right = torch.linalg.svd(points, full_matrices=False)
    assert (values[:, 1] / values[:, 0]).max() < 0.8
    for row, component in enumerate(right[:, 0].view(5, 4, 5).float()):
        inner = component[1:-1, 1:-1].mean()
        component = component if inner > component.mean() else -component
        scaled = (component - component.min()) / (component.max() - component.min())
        torch.testing.assert_close(maps[row], scaled, atol=1e-3, rtol=0)
        torch.testing.assert_close(principal_map(features[row : row + 1])[0], maps[row])


def test_a_principal_map_keeps_its_precision_under_autocast() -> None:
    features = torch.randn(3, 16, 5, 5, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(principal_map(features), principal_map(features.float()))
        mixed = principal_map(features)
    assert torch.equal(mixed, principal_map(features))


def test_on_a_map_without_inner_cells_the_smaller_part_is_the_object() -> None:
    features = torch.ones(1, 3, 2, 2)
    features[:, 0, 1, 0] = -2.0
    assert principal_map(features)[0].round(decimals=4).tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e20])
def test_a_principal_map_does_not_depend_on_the_scale_of_the_features(factor: float) -> None:
    features = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(principal_map(features * factor), principal_map(features), atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [0.0, -3.5, 1e4, float("nan"), float("inf")])
def test_a_constant_or_broken_map_is_all_ones_and_its_box_the_whole_image(value: float) -> None:
    for read in (activation_map, principal_map):
        maps = read(torch.full((2, 8, 3, 3), value, dtype=torch.bfloat16))
        assert maps.dtype == torch.float32
        assert bool((maps == 1).all())
        for threshold in (0.1, "otsu"):
            assert boxes_from_maps(maps, threshold, (48, 48)).tolist() == [WHOLE] * 2


def test_tokens_without_their_prefix_are_the_grid() -> None:
    maps = torch.randn(2, 5, 3, 4)
    tokens = torch.cat([torch.full((2, 2, 5), 99.0), maps.flatten(2).transpose(1, 2)], 1)
    assert torch.equal(feature_grid(tokens, prefix_tokens=2, grid=(3, 4)), maps)
    assert torch.equal(feature_grid(maps.permute(0, 2, 3, 1), channels_last=True), maps)
    square = torch.randn(2, 5, 3, 3)  # needs no grid
    assert torch.equal(feature_grid(square.flatten(2).transpose(1, 2)), square)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 10, 5), {}, "10 tokens with prefix_tokens=0 do not form a grid of 3 x 3"),
        ((2, 10, 5), {"prefix_tokens": 10}, "do not form a grid"),
        ((2, 9, 5), {"prefix_tokens": -7}, "do not form a grid"),
        ((2, 9, 5), {"grid": (2, 4)}, "do not form a grid of 2 x 4"),
        ((2, 5, 3, 3), {"prefix_tokens": 1}, "are for tokens"),
        ((5, 3), {}, r"features have shape \(5, 3\)"),
    ],
)
def test_features_of_unclear_layout_are_refused(
    shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        feature_grid(torch.zeros(shape), **options)
    with pytest.raises(ValueError, match="do not match"):
        gradient_map(torch.zeros(2, 3, 4, 4), torch.zeros(shape))


# ---- gradient maps


def looped_map(features: Tensor, gradients: Tensor) -> list[list[list[float]]]:
    """ContraCAM's map from its formula, number by number."""
    maps = []
    for planes, slopes in zip(features.tolist(), gradients.tolist(), strict=True):
        rows, columns = range(len(planes[0])), range(len(planes[0][0]))
        alphas = [max(sum(map(sum, slope)) / (len(rows) * len(columns)), 0.0) for slope in slopes]
        weighted = list(zip(alphas, planes, strict=True))
        cam = [[max(sum(a * plane[y][x] for a, plane in weighted), 0.0) for x in columns] for y in rows]
        low, high = min(map(min, cam)), max(map(max, cam))
        maps.append([[(value - low) / (high - low) if high > low else 1.0 for value in row] for row in cam])
    return maps


def test_a_gradient_map_is_that_of_a_loop_in_double_precision(device: str) -> None:
    features = torch.randn(20, 6, 4, 5, generator=torch.Generator().manual_seed(7)).double()
    gradients = torch.randn(20, 6, 4, 5, generator=torch.Generator().manual_seed(8)).double()
    gradients[3] = -gradients[3].abs()  # no channel raises the score
    there = features.float().to(on(device)), gradients.float().to(on(device))
    with without_waiting(device):
        maps = gradient_map(*there)
    expected = torch.tensor(looped_map(features, gradients))
    torch.testing.assert_close(maps.cpu(), expected, atol=1e-5, rtol=0)
    assert bool((maps[3] == 1).all())


def test_a_gradient_map_of_half_precision_loses_nothing_and_does_not_depend_on_the_loss_scale() -> None:
    features = torch.rand(4, 8, 3, 3, generator=torch.Generator().manual_seed(9)).half()
    # Near the least number that half precision holds.
    gradients = (1e-6 * torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(10))).half()
    maps = gradient_map(features, gradients)
    assert torch.equal(maps, gradient_map(features.float(), gradients.float()))
    torch.testing.assert_close(gradient_map(features, gradients * 1024), maps, atol=1e-6, rtol=0)


# ---- of a model


def test_heatmaps_of_a_batch_leave_every_training_flag_and_statistic_alone(
    resnet: nn.Module, images: Tensor
) -> None:
    resnet.train()
    frozen = resnet.get_submodule("layer2")
    frozen.eval()
    before = [module.training for module in resnet.modules()]
    mean = resnet.get_buffer("bn1.running_mean").clone()
    maps = heatmaps(resnet, images, "layer3")
    assert maps.shape == (2, 4, 4)
    assert not maps.requires_grad
    assert [module.training for module in resnet.modules()] == before
    assert torch.equal(resnet.get_buffer("bn1.running_mean"), mean)
    torch.testing.assert_close(heatmaps(resnet, images[1:], "layer3"), maps[1:])  # eval: no batch effect
    with pytest.raises(RuntimeError):
        heatmaps(resnet, images[:, :2], "layer3")
    assert [module.training for module in resnet.modules()] == before


def test_heatmaps_see_through_distributed_data_parallel_and_a_compiled_model_that_already_ran(
    tmp_path: Path, images: Tensor
) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = small_net()
        model = nn.parallel.DistributedDataParallel(net)
        with FeatureTap(model, "2.0") as tap:
            model(images)
        assert tap.features.shape == (2, 8, 60, 60)
        compiled = cast(nn.Module, torch.compile(net, backend="eager"))
        compiled(images)  # finished graphs do not see the hooks of a tap
        for wrapped in (model, compiled):
            torch.testing.assert_close(heatmaps(wrapped, images, "2.0"), heatmaps(net, images, "2.0"))
        assert model.training
    finally:
        torch.distributed.destroy_process_group()
