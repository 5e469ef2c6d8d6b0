"""Encoders by name: what comes out, and what is said about names that do not exist."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainers.encoders.backbones import build_backbone, check_sizes, look
from trainers.guides.encoder_maps import as_grid


def seen_by_hook(net: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    caught: list[Tensor] = []
    net.get_submodule(layer).register_forward_hook(lambda _m, _i, output: caught.append(output))
    return net(images), caught[-1]


@pytest.mark.parametrize(("name", "dim"), [("resnet18", 512), ("resnet50", 2048)])
def test_a_resnet_gives_pooled_features_of_its_width(name: str, dim: int) -> None:
    net = build_backbone(name).eval()
    features, heat = seen_by_hook(net, net.feature_layer, torch.randn(2, 3, 64, 64))
    assert net.dim == dim
    assert net.feature_layer == "layer4"
    assert heat.shape == (2, dim, 2, 2)
    torch.testing.assert_close(features, heat.mean(dim=(2, 3)))


def test_the_small_stem_keeps_a_map_of_four_by_four_for_cifar() -> None:
    net = build_backbone("resnet18", "small").eval()
    _, heat = seen_by_hook(net, net.feature_layer, torch.randn(2, 3, 32, 32))
    assert heat.shape == (2, 512, 4, 4)
    assert tuple(net.get_parameter("conv1.weight").shape) == (64, 3, 3, 3)


@pytest.mark.parametrize(
    ("name", "size"),
    [("mobilenet_v3_small", 64), ("convnext_tiny", 32), ("vit_b_32", 224), ("regnet_y_400mf", 64)],
)
def test_other_torchvision_families_lose_their_classifier_too(name: str, size: int) -> None:
    net = build_backbone(name).eval()
    with torch.inference_mode():
        features, heat = seen_by_hook(net, net.feature_layer, torch.randn(1, 3, size, size))
    assert features.shape == (1, net.dim)
    assert heat.ndim in (3, 4)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("swin_s3_tiny_224", "layers.3"), ("mambaout_femto", "stages.3"), ("xcit_nano_12_p16_224", "blocks.11"),
     ("mobilenetv3_small_050", "blocks.5"), ("test_vit", "blocks.5"), ("lcnet_035", "blocks.5")],
)  # fmt: skip
def test_timms_families_tell_their_width_and_where_their_maps_have_their_channels(name, layer) -> None:
    net = build_backbone(name)
    assert net.feature_layer == layer
    size = net.default_cfg["input_size"][-1]
    pooled, features = look(net, size, layer)
    assert pooled.shape == (1, net.dim)
    maps = as_grid(net, features)
    assert maps.shape[2] == maps.shape[3] == size // net.feature_info[-1]["reduction"]
    assert maps.shape[1] == net.feature_info[-1]["num_chs"]
    assert net.training


def test_images_that_an_encoder_does_not_take_are_told_in_a_sentence() -> None:
    net = build_backbone("swin_s3_tiny_224")
    with pytest.raises(ValueError, match="SwinTransformer does not take images of 64 pixels"):
        check_sizes(net, {64})


def test_parameters_keep_torchvisions_names_without_the_classifier() -> None:
    names = set(build_backbone("resnet18").state_dict())
    assert "layer4.1.conv2.weight" in names
    assert not any(name.startswith("fc.") for name in names)


@pytest.mark.parametrize(
    ("name", "stem", "words"),
    [
        ("resnet51", "imagenet", "did you mean resnet"),
        ("zzzz", "imagenet", "choose a torchvision name"),
        ("squeezenet1_0", "imagenet", "no single linear classifier"),
        ("mobilenet_v3_small", "small", "fits ResNets only"),
    ],
)
def test_what_does_not_fit_is_named(name: str, stem: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_backbone(name, stem)  # type: ignore[arg-type]
