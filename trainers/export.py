"""A trained encoder as a file that torchvision or timm load, written only if they compute the same with it.

export(Path("runs/photos"), Path("encoder.safetensors"), "timm")
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torchvision
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from dali_views.system.files import atomic_write

from . import config as cfg
from .encoders.backbones import Backbone
from .encoders.key_maps import Library, architecture_in, convert
from .saved_run import encoder_of, load_run

__all__ = ["TOLERANCE", "Exported", "export", "write"]

TOLERANCE = 1e-4
"""Largest difference of features, as a share of the largest feature, that is taken for rounding."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    architecture: str
    """The network's name in the library it was written for."""
    difference: float
    """Largest difference between that library's features and the trained encoder's on random images, as
    a share of the largest feature."""
    tensors: int
    """How many tensors the file holds, batch norm's statistics included."""


def export(run: Path, out: Path, format: Library = "torchvision") -> Exported:
    """Write a run's encoder, without heads, as safetensors with the names of a library's tensors.

    The file takes its place at `out`, where an older one may stand, after it was read back into a network
    that the library has just made, and that network's features on random images were those of the encoder.

    Args:
        run: run folder, or its last.pt.
        out: the file to write; folders above it are made.
        format: the library to load it with.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the network does not exist in this library, or timm is not installed.
        RuntimeError: the file does not fit the library's network or gives other features; none is left.
    """
    _, config, saved = load_run(run)
    backbone, stem = config.model.backbone, config.model.stem
    encoder = encoder_of(config, saved, "trained", torch.device("cpu"))
    # A backbone keeps its library's class.
    source = cast(Library, type(encoder).__module__.partition(".")[0])
    architecture = architecture_in(format, backbone, source)
    network = _library_network(architecture, format, stem)
    tensors = convert(encoder.state_dict(), backbone, source, format)
    metadata = _metadata(config, format, architecture, int(saved["step"]))
    difference = write(tensors, metadata, out, network, encoder, _fixed_size(encoder) or config.views.size)
    return Exported(out, architecture, difference, len(tensors))


def write(
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str],
    out: Path,
    network: nn.Module,
    encoder: Backbone,
    size: int,
) -> float:
    """Write tensors, provided that what is read back makes of `network` the same as `encoder`.

    Args:
        network: headless, in the library's own shape; it gets the tensors.
        size: height and width in pixels of the random images on which the two are compared.

    Returns:
        The difference of their features, see `Exported`.

    Raises:
        RuntimeError: tensors are missing or left over, or features differ by more than `TOLERANCE`; a file
            that stood at `out` stays.
    """
    with atomic_write(out) as file:
        file.write(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata))
        file.flush()
        try:
            network.load_state_dict(load_file(file.name))
        except RuntimeError as error:
            raise RuntimeError(
                f"{out} was not written, for the library's network is another: {error}"
            ) from None
        difference = _difference(network, encoder, size)
        if not difference <= TOLERANCE:  # so that nan is refused too
            raise RuntimeError(
                f"{out} was not written, for features differ by {difference:.1e} of the largest, which is "
                f"more than {TOLERANCE:.0e}; please report the backbone and the format"
            )
    return difference


def _library_network(architecture: str, library: Library, stem: str) -> nn.Module:
    """A library's own network under this name with random weights, without its classifier."""
    model = _torchvision(architecture) if library == "torchvision" else _timm(architecture)
    if stem == "small":  # the two changes that `build_backbone` makes
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


def _torchvision(name: str) -> nn.Module:
    if name == "resnet10":
        model: nn.Module = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1])
    else:
        model = torchvision.models.get_model(name, weights=None)
    # In all of torchvision's classifiers this is the last linear layer.
    classifier = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    model.set_submodule(classifier, nn.Identity())
    return model


def _timm(name: str) -> nn.Module:
    try:
        import timm
        from timm.models import resnet
    except ImportError:
        raise ValueError(
            "format timm is checked with timm, which is not installed; pip install timm"
        ) from None
    if name == "resnet10":
        return cast(nn.Module, resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), num_classes=0))
    return cast(nn.Module, timm.create_model(name, pretrained=False, num_classes=0))


def _fixed_size(encoder: nn.Module) -> int | None:
    """Pixels that a transformer's position embedding is for; None for networks that take any size."""
    if isinstance(encoder, torchvision.models.VisionTransformer):
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
        "format": format,
        "architecture": architecture,
        "stem": config.model.stem,
        "method": config.method.name,
        "step": str(step),
        "size": str(config.views.size),
        "mean": json.dumps(config.views.mean),
        "std": json.dumps(config.views.std),
        "project": "dali-views",
        "version": version,
    }
