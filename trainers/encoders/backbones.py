"""Encoders by name, headless: pooled features out, with their width and the layer to look at."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from types import MethodType
from typing import Any, Literal, cast

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from dali_views.maps.tap import FeatureTap

__all__ = ["Backbone", "build_backbone", "check_sizes", "freeze", "look", "shrink_stem"]

# The last spatial module of each torchvision family, looked up in this order.
_SPATIAL_LAYERS = ("layer4", "permute", "features", "trunk_output", "encoder", "blocks", "conv5", "layers")


class Backbone(nn.Module):
    """What `build_backbone` returns has these attributes, and keeps its library's class.

    Calling it on images (B, 3, H, W) gives pooled features (B, dim).
    """

    dim: int
    feature_layer: str
    """Dotted name of the last spatial module."""
    prefix_tokens: int
    """Class and register tokens in front of a transformer's other tokens; 0 for other networks."""
    channels_last_maps: bool
    """Whether its spatial modules give (B, h, w, C), as timm's Swin does."""
    stage_layers: tuple[str, ...]
    """Dotted names of the last three stages, coarsest last; of a transformer, blocks at one half, three
    quarters and the end of its depth (our choice). Empty if none are known."""
    stage_ends: tuple[str, ...]
    """Dotted names of the modules that its stages end with; of a transformer, all blocks."""
    head_names: tuple[str, ...]
    """Dotted names of what was taken off."""

    def __call__(self, images: Tensor) -> Tensor:
        return cast(Tensor, super().__call__(images))


def build_backbone(
    name: str, stem: Literal["imagenet", "small"] = "imagenet", zero_init_residual: bool = False
) -> Backbone:
    """A randomly initialised encoder without its classifier; parameters keep their library's names.

    Args:
        name: a torchvision classification model such as "resnet50", "resnet10" (its small sibling), or a timm
            model if timm is installed.
        stem: "small" makes the first convolution 3x3 with stride 1 and drops the max-pool, so that images
            of 32 or 64 pixels keep a map of 4 or 8 (ResNets only; as in SimCLR, arXiv 2002.05709, B.9).
        zero_init_residual: start the last batch norm of every residual block at 0 (ResNets only).

    Raises:
        ValueError: the name is unknown, the model has no classifier to take off, or the stem does not fit.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name == "resnet10":  # one block per stage: for demonstrations and tests
        net = _headless(torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1]), name)
    else:
        network = torchvision.models.get_model(name) if name in known else None
        net = _from_timm(name, known) if network is None else _headless(network, name)
    if stem == "small":
        shrink_stem(net, name)
    if zero_init_residual:
        _zero_init_residual(net, name)
    net.stage_ends = _stages(net)
    net.stage_layers = net.stage_ends[-3:]
    if hasattr(net, "class_token") or hasattr(net, "cls_token"):
        depth = len(net.stage_ends)
        net.stage_layers = tuple(net.stage_ends[round(depth * share) - 1] for share in (0.5, 0.75, 1.0))
    # timm's transformers count theirs; torchvision's have a class token.
    net.prefix_tokens = int(getattr(net, "num_prefix_tokens", hasattr(net, "class_token")))
    net.channels_last_maps = False
    if name not in known and name != "resnet10":
        _measure(net, name)
    return net


@torch.no_grad()
def look(net: Backbone, size: int, layer: str | None = None) -> tuple[Tensor, Tensor]:
    """Pooled features (1, dim) of one empty image, and the output of a layer (the features, if None).

    Raises:
        ValueError: there is no such layer, or the encoder does not take square images of `size` pixels.
    """
    training = net.training
    net.eval()  # so that running statistics do not see it
    try:
        with FeatureTap(net, "" if layer is None else layer) as tap:
            pooled = net(torch.zeros(1, 3, size, size, device=next(net.parameters()).device))
            return pooled, tap.features
    except (AssertionError, RuntimeError, TypeError) as error:  # libraries say it in many ways
        told = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise ValueError(f"{type(net).__name__} does not take images of {size} pixels ({told})") from error
    finally:
        net.train(training)


def check_sizes(net: Backbone, sizes: Collection[int]) -> None:
    """Raise a ValueError if an encoder cannot take square images of all these sizes, in pixels."""
    if isinstance(net, torchvision.models.VisionTransformer) and set(sizes) != {net.image_size}:
        raise ValueError(
            f"torchvision's transformers take {net.image_size} pixels only, not {sorted(sizes)}; "
            "timm's, such as vit_small_patch16_224, take any multiple of their patch"
        )
    for size in sorted(set(sizes)):
        look(net, size)


def _headless(model: nn.Module, name: str) -> Backbone:
    """One of torchvision's classifiers without its last linear layer."""
    net = cast(Backbone, model)
    linears = [(path, module) for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linears or hasattr(net, "aux_logits"):
        raise ValueError(f"backbone {name} has no single linear classifier to take off; choose a ResNet")
    path, classifier = linears[-1]
    net.set_submodule(path, nn.Identity())
    net.dim, net.head_names = classifier.in_features, (path,)
    net.feature_layer = next((layer for layer in _SPATIAL_LAYERS if hasattr(net, layer)), "")
    if net.feature_layer == "blocks":
        net.feature_layer = f"blocks.{len(cast(nn.ModuleList, net.blocks)) - 1}"
    return net


def _from_timm(name: str, known: list[str]) -> Backbone:
    try:
        import timm
    except ImportError:
        names, hint = known, "; timm is not installed, so its names are not available"
    else:
        if timm.is_model(name):
            # With this, transformers resample their position embedding for views of several sizes.
            options = {"dynamic_img_size": True} if _is_timm_vit(name) else {}
            net = cast(Backbone, timm.create_model(name, pretrained=False, num_classes=0, **options))
            info = cast(list[dict[str, str]], getattr(net, "feature_info", None) or [{"module": ""}])
            net.feature_layer = info[-1]["module"]
            taken = cast(str | tuple[str, ...], cast(dict[str, Any], net.default_cfg).get("classifier") or ())
            net.head_names = (taken,) if isinstance(taken, str) else tuple(taken)
            return net
        names, hint = [*known, *timm.list_models()], ""
    near = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {near[0]}?" if near else "choose a torchvision name such as resnet50"
    raise ValueError(f"backbone {name!r} is not known; {remedy}{hint}")


def _measure(net: Backbone, name: str) -> None:
    """Measure what timm's models do not state in one way: width, layout of maps, tokens in front."""
    size = int(cast(dict[str, tuple[int, int, int]], net.default_cfg)["input_size"][-1])
    names = dict(net.named_modules())
    if net.feature_layer not in names:  # some name a layer that they do not have
        net.feature_layer = ""
    pooled, features = look(net, size, net.feature_layer)
    if pooled.ndim != 2:
        raise ValueError(
            f"backbone {name} gives {tuple(pooled.shape)} and no pooled features; choose another"
        )
    net.dim = pooled.shape[1]
    if features.ndim == 4:  # the image is square, so the map is, too
        net.channels_last_maps = features.shape[1] == features.shape[2] != features.shape[3]
    elif features.ndim == 3 and math.isqrt(features.shape[1]) ** 2 == features.shape[1]:
        net.prefix_tokens = 0  # some add their class token after this layer


def shrink_stem(net: nn.Module, name: str) -> None:
    """Make a ResNet's first convolution 3x3 with stride 1, and drop its max-pool."""
    old = getattr(net, "conv1", None)
    if not isinstance(old, nn.Conv2d) or not hasattr(net, "maxpool"):
        raise ValueError(f"stem small fits ResNets only, not {name}; use stem imagenet")
    conv = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    net.conv1 = conv
    net.maxpool = nn.Identity()


def _is_timm_vit(name: str) -> bool:
    from timm.models import model_entrypoint

    family = str(model_entrypoint(name).__module__).rpartition(".")[2]
    return family in ("vision_transformer", "deit")


def _zero_init_residual(net: nn.Module, name: str) -> None:
    blocks = [module for module in net.modules() if isinstance(module, (BasicBlock, Bottleneck))]
    if not blocks:
        raise ValueError(f"model.zero_init_residual fits torchvision's ResNets only, not {name}; remove it")
    for block in blocks:
        norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
        nn.init.zeros_(cast(Tensor, norm.weight))


def _stages(net: Backbone) -> tuple[str, ...]:
    if all(hasattr(net, f"layer{number}") for number in (2, 3, 4)):  # ResNets of both libraries
        return "layer1", "layer2", "layer3", "layer4"
    if isinstance(net, torchvision.models.ConvNeXt):  # stages and downsampling layers in turn
        return "features.1", "features.3", "features.5", "features.7"
    if isinstance(net, torchvision.models.VisionTransformer):
        return tuple(f"encoder.layers.encoder_layer_{i}" for i in range(len(net.encoder.layers)))
    return tuple(str(entry["module"]) for entry in getattr(net, "feature_info", ()))


def freeze(net: Backbone, count: int) -> None:
    """Keep the first stages of a network, and all that was registered before their end, as they are.

    They get no gradient, and stay in eval mode whatever `net.train` says: batch norm uses its running
    statistics and leaves them as they are, dropout is off.

    Raises:
        ValueError: the network has fewer stages, or none that are known.
    """
    modules = dict(net.named_modules())
    ends = [name for name in net.stage_ends if name in modules]
    if count > len(ends):
        raise ValueError(
            f"model.frozen_stages {count} is more than the {len(ends)} stages that are known of "
            f"{type(net).__name__}; lower it"
        )
    if count == 0:
        return
    end = f"{ends[count - 1]}."
    names = list(modules)
    names = names[: 1 + max(i for i, name in enumerate(names) if f"{name}.".startswith(end))]
    for name in names:  # of what holds the last frozen stage, too: a position embedding
        for parameter in modules[name].parameters(recurse=False):
            parameter.requires_grad_(False)
    frozen = [name for name in names if name and (f"{name}." == end or not end.startswith(f"{name}."))]

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        type(self).train(self, mode)
        for name in frozen:
            self.get_submodule(name).training = False
        return self

    net.train = MethodType(train, net)  # type: ignore[method-assign]
    net.train(net.training)
