"""The same network in two libraries: its name, and the names and shapes of its tensors, either way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from torch import Tensor

__all__ = ["ARCHITECTURES", "Library", "architecture_in", "convert"]

Library: TypeAlias = Literal["torchvision", "timm"]

ARCHITECTURES: dict[str, str] = {
    name: name
    for name in (
        "resnet10",  # in neither library by name, but one block per stage of either's ResNet
        "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
        "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
        "wide_resnet50_2", "wide_resnet101_2",
        "convnext_tiny", "convnext_small", "convnext_base", "convnext_large",
    )
} | {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
}  # fmt: skip
"""timm's name by torchvision's, for networks that compute the same in both."""

_TORCHVISION_NAME = {timm: torchvision for torchvision, timm in ARCHITECTURES.items()}

# Parts of names, torchvision's first, replaced one after the other. ResNets have the same names in both.
_CONVNEXT = (
    ("features.0.", "stem."),
    ("features.1.", "stages.0.blocks."),
    ("features.2.", "stages.1.downsample."),
    ("features.3.", "stages.1.blocks."),
    ("features.4.", "stages.2.downsample."),
    ("features.5.", "stages.2.blocks."),
    ("features.6.", "stages.3.downsample."),
    ("features.7.", "stages.3.blocks."),
    ("classifier.0.", "head.norm."),  # before ".norm.", which would match it on the way back
    (".block.0.", ".conv_dw."),
    (".block.2.", ".norm."),
    (".block.3.", ".mlp.fc1."),
    (".block.5.", ".mlp.fc2."),
    (".layer_scale", ".gamma"),
)
_VIT = (
    ("class_token", "cls_token"),
    ("conv_proj.", "patch_embed.proj."),
    ("encoder.pos_embedding", "pos_embed"),
    ("encoder.ln.", "norm."),
    ("encoder.layers.encoder_layer_", "blocks."),
    (".ln_1.", ".norm1."),
    (".self_attention.in_proj_", ".attn.qkv."),  # both stack query, key and value in this order
    (".self_attention.out_proj.", ".attn.proj."),
    (".ln_2.", ".norm2."),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.3.", ".mlp.fc2."),
)
_RENAMES = {"convnext": _CONVNEXT, "vit": _VIT}


def architecture_in(target: Library, backbone: str, source: Library) -> str:
    """The name under which `target` makes the network that `source` calls `backbone`.

    Raises:
        ValueError: it is only known to exist in `source`.
    """
    if target == source:
        return backbone
    names = ARCHITECTURES if source == "torchvision" else _TORCHVISION_NAME
    name = names.get(_plain(backbone))
    if name is None:
        raise ValueError(f"backbone {backbone} can be exported to {source} only, not to {target}")
    return name


def convert(
    tensors: Mapping[str, Tensor], backbone: str, source: Library, target: Library
) -> dict[str, Tensor]:
    """A headless network's tensors under the names and in the shapes of another library.

    Only ConvNeXt's layer scale differs in shape: (C, 1, 1) in torchvision, (C,) in timm.

    Args:
        tensors: state dict of `backbone` as `source` names it.
        backbone: name in `source`, one that `architecture_in` accepts.
    """
    if source == target:
        return dict(tensors)
    to_timm = target == "timm"
    name = backbone if to_timm else _TORCHVISION_NAME[_plain(backbone)]
    renames = _RENAMES.get(name.partition("_")[0], ())
    converted = {}
    for key, tensor in tensors.items():
        for pair in renames:
            old, new = pair if to_timm else reversed(pair)
            key = key.replace(old, new)
        if key.endswith((".gamma", ".layer_scale")):
            tensor = tensor.flatten() if to_timm else tensor.view(-1, 1, 1)
        converted[key] = tensor
    return converted


def _plain(name: str) -> str:
    """A timm name without the tag that tells where published weights come from (resnet50.a1_in1k)."""
    return name.partition(".")[0]
