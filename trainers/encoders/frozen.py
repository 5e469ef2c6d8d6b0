"""An encoder that does not learn, its weights from a file, and its features of a set of images."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dali_views import SampleIndex

from .. import config as cfg
from ..data import evaluation_views, plain_loader
from ..engine import checkpoint
from ..engine.setting import Setting
from ..evaluate.knn import extract
from ..saved_run import encoder_of, load_run
from .backbones import Backbone, build_backbone

__all__ = ["embed", "frozen_encoder", "load_weights"]

_PART = 16384  # images whose features are held in float32 at a time
_SHOWN = 3  # names of tensors in an error


def frozen_encoder(views: cfg.Views, source: str | Path, device: torch.device) -> tuple[Backbone, cfg.Views]:
    """An encoder to measure similarity with, and the views to `embed` with.

    Nothing is downloaded: pretrained weights are those of a file or of the library's cache, and torch's
    random numbers go on as if nothing had been built. The paper's encoder learnt without labels;
    torchvision's learnt from ImageNet's, and so did most of timm's.

    Args:
        source: a run folder or its last.pt; "torchvision:NAME" (its default weights) or "timm:NAME", from the
            cache; or "torchvision:NAME:FILE" or "timm:NAME:FILE", where the file holds a state dict of that
            model, see `load_weights`.

    Returns:
        The encoder in eval mode, without gradients, on `device`; and `views` with the size and
        normalisation that this encoder was trained with: for a library's those of its own weights
        of this name, whatever the file.

    Raises:
        FileNotFoundError: the folder holds no checkpoint, or there is no such file.
        ValueError: the library has no such model, its weights are not on this machine, or the file does not
            hold them.
    """
    library, _, rest = str(source).partition(":")
    name, _, file = rest.partition(":")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if library == "torchvision":
            encoder, like = _from_torchvision(name, file)
        elif library == "timm":
            encoder, like = _from_timm(name, file)
        else:
            _, run, saved = load_run(Path(source))
            encoder = encoder_of(run, saved, "trained", device)
            like = {key: getattr(run.views, key) for key in ("size", "mean", "std")}
    encoder.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return encoder, views.model_copy(update=like)


def _from_torchvision(name: str, file: str) -> tuple[Backbone, dict[str, Any]]:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"torchvision has no pretrained encoder {name!r}; choose one such as resnet50")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    encoder = build_backbone(name)
    if file:
        load_weights(encoder, torchvision.models.get_model(name, weights=None), Path(file))
    else:
        fetch = f"torchvision.models.get_model({name!r}, weights='DEFAULT')"
        _in_cache(_hub_file(weights.url), f"torchvision:{name}", fetch)
        learnt = torchvision.models.get_model(name, weights=weights).state_dict()
        encoder.load_state_dict({key: learnt[key] for key in encoder.state_dict()})
    preset = weights.transforms()
    return encoder, {"size": preset.crop_size[0], "mean": tuple(preset.mean), "std": tuple(preset.std)}


def _from_timm(name: str, file: str) -> tuple[Backbone, dict[str, Any]]:
    try:
        import timm
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        raise ValueError(f"timm:{name} needs timm, which is not installed; pip install timm") from None
    if not timm.models.is_model_pretrained(name):
        raise ValueError(f"timm has no pretrained encoder {name!r}; choose one of timm.list_pretrained()")
    learnt = timm.models.get_pretrained_cfg(name)
    encoder = build_backbone(name)
    if file:
        load_weights(encoder, timm.create_model(name, num_classes=1), Path(file))
    else:
        files = [_hub_file(learnt.url)] if learnt.url else []
        if learnt.hf_hub_id:
            names = ("model.safetensors", "pytorch_model.bin")
            files = [try_to_load_from_cache(learnt.hf_hub_id, each) for each in names]
        cached = next((each for each in files if isinstance(each, str)), None)
        _in_cache(cached, f"timm:{name}", f"timm.create_model({name!r}, pretrained=True)")
        pretrained = timm.create_model(
            name, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(cached)}
        )
        encoder.load_state_dict(pretrained.state_dict())
    like = {"size": learnt.input_size[-1], "mean": tuple(learnt.mean), "std": tuple(learnt.std)}
    return encoder, like


def _hub_file(url: str) -> str | None:
    """Where torch keeps what it fetched from an address, if it did."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    return str(file) if file.is_file() else None


def _in_cache(file: str | None, source: str, fetch: str) -> None:
    if file is None:
        raise ValueError(
            f"the weights of {source} are not on this machine; fetch them once, where there is a network, "
            f"with {fetch}, or name a file that holds them, {source}:FILE, or a run folder"
        )


def load_weights(encoder: nn.Module, classifier: nn.Module, file: Path) -> None:
    """Fill an encoder with the state dict in a file; nothing in the file is executed.

    Args:
        classifier: the same network with its head: in the file a head of these names is ignored.
        file: .safetensors, or else what torch.save made of a state dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds no state dict, or another network's; names the first tensors.
    """
    found, own = _read(file), encoder.state_dict()
    head = classifier.state_dict().keys() - own.keys()
    # Old files lack the counters of batch norm; an encoder that does not learn does not use them.
    wrong = {
        "missing": [name for name in own if name not in found and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in found if name not in own and name not in head],
        "of another shape": [name for name in own if name in found and found[name].shape != own[name].shape],
    }
    faults = [f"{len(names)} {fault} ({_first(names)})" for fault, names in wrong.items() if names]
    if faults:
        raise ValueError(f"{file} does not fit this encoder; of its tensors {', '.join(faults)}")
    encoder.load_state_dict({name: found[name] for name in own if name in found}, strict=False)


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file of weights {file}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = checkpoint.read(file, legacy=True)
    except (LookupError, SafetensorError, ValueError) as error:  # LookupError: a type that PyTorch has not
        raise ValueError(f"{file} cannot be read as weights alone: {error}") from error
    if not isinstance(found, Mapping) or not all(isinstance(each, Tensor) for each in found.values()):
        held = _first(list(found)) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{file} holds no state dict but {held}; save model.state_dict() alone")
    return dict(found)


def _first(names: list[str]) -> str:
    return ", ".join(map(str, names[:_SHOWN])) + ", ..." * (len(names) > _SHOWN)


@torch.no_grad()
def embed(setting: Setting, views: cfg.Views, encoder: Backbone, index: SampleIndex) -> Tensor:
    """Features of the plain central view of every image, in the order of the index, equal on all ranks.

    Peak memory on the device, beside the network and a batch of at most 256 images, is 2 N D + 16 P D bytes,
    where P = min(N, 16384), or the batches of all ranks if that is more: 5.2 GB + 0.5 GB for ImageNet's
    N = 1,281,167 and D = 2048.

    Returns:
        (N, D) float16 on `device`, rows of length 1. An image that cannot be read has a row of zeros.
    """

    def unit(images: Tensor) -> Tensor:
        with setting.autocast():
            features = encoder(images)
        return F.normalize(features.float(), dim=1)

    loader = plain_loader(setting, views, index, evaluation_views(views))
    batches, at_a_time = iter(loader), max(1, _PART // loader.global_batch)
    training = encoder.training
    encoder.eval()
    whole = torch.zeros(0, dtype=torch.float16, device=setting.device)
    for _ in range(0, len(loader), at_a_time):
        features, _, rows = extract(unit, islice(batches, at_a_time), setting.device)
        if not len(whole):
            whole = whole.new_zeros(len(index), features.shape[1])
        whole[rows] = features.half()
    encoder.train(training)
    return whole
