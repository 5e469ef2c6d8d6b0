"""A trained encoder as a file that torchvision or timm load, if they compute the same with it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision import models

from dali_views.system.files import atomic_write

from . import config as cfg
from .encoders.backbones import Backbone, build_backbone, shrink_stem
from .saved_run import encoder_of, load_run

__all__ = ["TOLERANCE", "Exported", "Library", "export", "write"]

Library: TypeAlias = Literal["torchvision", "timm"]

TOLERANCE = 1e-4
"""Largest difference of features, as a share of the largest feature, that is taken for rounding."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    architecture: str
    """The network's name in the library it was written for."""
    difference: float
    """Largest difference of that library's features from the encoder's, as a share of the largest."""
    tensors: int
    """How many tensors the file holds, batch norm's statistics included."""


def export(run: Path, out: Path, format: Library = "torchvision") -> Exported:
    """Write a run's encoder, without heads, as safetensors with the names of a library's tensors.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: `out` does not end in .safetensors, the network does not exist in this library, or timm
            is not installed.
        RuntimeError: as by `write`.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} would hold safetensors; name it {out.with_suffix('.safetensors')}")
    _, config, saved = load_run(run)
    encoder = encoder_of(config, saved, "trained", torch.device("cpu"))
    # A backbone keeps its library's class.
    architecture = _named(config.model.backbone, type(encoder).__module__.partition(".")[0], format)
    network = _library_network(architecture, format, config.model.stem)
    tensors, metadata = encoder.state_dict(), _metadata(config, format, architecture, int(saved["step"]))
    difference = write(tensors, metadata, out, network, encoder, _fixed_size(encoder) or config.views.size)
    return Exported(out, architecture, difference, len(tensors))


def _named(backbone: str, home: str, target: Library) -> str:
    """The name in `target` of a network of `home`: only ResNets have the same tensors in both."""
    plain = backbone.partition(".")[0]  # without timm's tag of published weights (resnet50.a1_in1k)
    both = plain == "resnet10" or ("resne" in plain and plain in models.list_models(module=models))
    if target != home and not both:
        raise ValueError(
            f"backbone {backbone} can be exported to {home} only, not to {target}; give --format {home}, or "
            f"train a backbone of {target}"
        )
    return backbone if target == home else plain


def write(
    tensors: Mapping[str, Tensor], metadata: dict[str, str], out: Path, network: nn.Module, encoder: Backbone,
    size: int,
) -> float:  # fmt: skip
    """Write tensors, provided that what is read back makes of `network` the same as `encoder`.

    Args:
        network: headless, just made by the library; it gets the tensors.
        size: height and width in pixels of the random images on which the two are compared.

    Returns:
        The difference of their features, see `Exported`.

    Raises:
        RuntimeError: tensors are missing or left over, or features differ by more than `TOLERANCE`.
    """
    with atomic_write(out) as file:
        file.write(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata))
        file.flush()
        try:
            network.load_state_dict(load_file(file.name))
        except RuntimeError as error:
            raise RuntimeError(f"{out} was not written; the library's network is another: {error}") from None
        difference = _difference(network, encoder, size)
        if not difference <= TOLERANCE:  # so that nan is refused too
            told = f"features differ by {difference:.1e} of the largest, which is more than {TOLERANCE:.0e}"
            raise RuntimeError(f"{out} was not written; {told}; please report the backbone and the format")
    return difference


def _library_network(architecture: str, library: Library, stem: Literal["imagenet", "small"]) -> nn.Module:
    """A library's own network under this name with random weights, without its classifier."""
    if library == "torchvision":
        return build_backbone(architecture, stem)
    try:
        import timm
        from timm.models import resnet
    except ImportError:
        raise ValueError("format timm needs timm, which is not installed; pip install timm") from None
    if architecture == "resnet10":
        network = resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), num_classes=0)
    else:
        network = timm.create_model(architecture, pretrained=False, num_classes=0)
    if stem == "small":
        shrink_stem(network, architecture)
    return cast(nn.Module, network)


def _fixed_size(encoder: nn.Module) -> int | None:
    """Pixels that a transformer's position embedding is for; None for networks that take any size."""
    if isinstance(encoder, models.VisionTransformer):
        return int(encoder.image_size)
    size = getattr(getattr(encoder, "patch_embed", None), "img_size", None)  # timm's (height, width)
    return None if size is None else int(size[0])


@torch.inference_mode()
def _difference(network: nn.Module, encoder: Backbone, size: int) -> float:
    """Largest difference of pooled features on two images of unit noise, as a share of the largest."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected, found = encoder.eval()(images), network.eval()(images)
    if expected.shape != found.shape:
        raise RuntimeError(f"features have shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / largest)


def _metadata(config: cfg.Config, format: Library, architecture: str, step: int) -> dict[str, str]:
    """What a user of the file must know; lists as JSON, for safetensors keeps text only."""
    try:
        version = importlib.metadata.version("dali-views")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        version = "unknown"
    return {
        "format": format, "architecture": architecture, "stem": config.model.stem, "step": str(step),
        "method": config.method.name, "size": str(config.views.size), "mean": json.dumps(config.views.mean),
        "std": json.dumps(config.views.std), "project": "dali-views", "version": version,
    }  # fmt: skip
