"""Encoders by name, headless: pooled features out, with their width and the layer to look at."""

from __future__ import annotations

import difflib
from typing import Literal, cast

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

__all__ = ["Backbone", "build_backbone"]

# The last spatial module of each torchvision family, looked up in this order.
_SPATIAL_LAYERS = ("layer4", "permute", "features", "trunk_output", "encoder", "blocks", "conv5", "layers")


class Backbone(nn.Module):
    """What `build_backbone` promises about its result (the result itself keeps its library's class).

    Calling it on images (B, 3, H, W) gives pooled features (B, dim).
    """

    dim: int
    feature_layer: str

    def __call__(self, images: Tensor) -> Tensor:
        return cast(Tensor, super().__call__(images))


def build_backbone(name: str, stem: Literal["imagenet", "small"] = "imagenet") -> Backbone:
    """A randomly initialised encoder without its classifier; parameters keep their library's names.

    Args:
        name: a torchvision classification model such as "resnet50", "resnet10" (its small sibling), or a timm
            model if timm is installed.
        stem: "small" makes the first convolution 3x3 with stride 1 and drops the max-pool, so that images
            of 32 or 64 pixels keep a map of 4 or 8 (ResNets only; as in SimCLR, arXiv 2002.05709, B.9).

    Returns:
        The module; `dim` is its feature width, `feature_layer` the dotted name of its last spatial module.

    Raises:
        ValueError: the name is unknown, the model has no classifier to take off, or the stem does not fit.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name == "resnet10":  # one block per stage: for demonstrations and tests
        net = _headless(torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1]), name)
    else:
        net = _from_torchvision(name) if name in known else _from_timm(name, known)
    if stem == "small":
        _shrink_stem(net, name)
    return net


def _from_torchvision(name: str) -> Backbone:
    return _headless(torchvision.models.get_model(name, weights=None), name)


def _headless(model: nn.Module, name: str) -> Backbone:
    net = cast(Backbone, model)
    linears = [(path, module) for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linears or hasattr(net, "aux_logits"):
        raise ValueError(f"backbone {name} has no single linear classifier to take off; choose a ResNet")
    path, classifier = linears[-1]
    net.set_submodule(path, nn.Identity())
    net.dim = classifier.in_features
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
            net = cast(Backbone, timm.create_model(name, pretrained=False, num_classes=0))
            net.dim = int(cast(int, net.num_features))
            info = cast(list[dict[str, str]], getattr(net, "feature_info", None) or [{"module": ""}])
            net.feature_layer = info[-1]["module"]
            return net
        names, hint = [*known, *timm.list_models()], ""
    near = difflib.get_close_matches(name, names, n=1)
    mend = f"did you mean {near[0]}?" if near else "choose a torchvision name such as resnet50"
    raise ValueError(f"backbone {name!r} is not known; {mend}{hint}")


def _shrink_stem(net: nn.Module, name: str) -> None:
    old = getattr(net, "conv1", None)
    if not isinstance(old, nn.Conv2d) or not hasattr(net, "maxpool"):
        raise ValueError(f"stem small fits ResNets only, not {name}; use stem imagenet")
    conv = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    net.conv1 = conv
    net.maxpool = nn.Identity()
