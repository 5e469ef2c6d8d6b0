"""Weights of an encoder from elsewhere: a run, any project's file, a library. Nothing in them is executed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..engine import checkpoint
from .backbones import Backbone, build_backbone

__all__ = ["library_encoder", "load_weights"]

_SHOWN = 3  # names of tensors in an error
# What a state dict lies in: checkpoints of ours (runs, fine-tuning), of timm, MoCo, DINO, MAE, Lightning ...
_WRAPPERS = ("method", "learner", "state_dict", "model_state_dict", "model", "teacher")
# Where the encoder lies in a state dict: of two that fit the first one, as a teacher is what a run measures.
_PREFIXES = ("", "teacher_backbone.", "backbone.", "encoder_q.", "encoder.")


def load_weights(encoder: Backbone, source: str | Path) -> None:
    """Fill an encoder with weights, wherever they are; torch's random numbers go on as before.

    Other networks beside the encoder (projectors, queues, a momentum encoder) are left out, and so is a
    classifier in its place.

    Args:
        source: a run folder; a file of tensors (.safetensors, or else what torch.save made), bare or as
            checkpoints of usual projects hold them; or as for `library_encoder`.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the folder.
        ValueError: the file is damaged, holds no state dict, or another network's; names the first tensors.
    """
    with torch.random.fork_rng(devices=[]):
        library = library_encoder(str(source))
    own = encoder.state_dict()
    found = _encoder_in(_read(Path(source)) if library is None else library[0].state_dict(), own)
    head = tuple(f"{name}." for name in encoder.head_names)
    shapes = {name: (tuple(found[name].shape), tuple(own[name].shape)) for name in own if name in found}
    other = [name for name, (theirs, ours) in shapes.items() if theirs != ours]
    if "conv1.weight" in other and shapes["conv1.weight"][0][1:2] == shapes["conv1.weight"][1][1:2]:
        theirs, ours = ("x".join(map(str, shape[2:])) for shape in shapes["conv1.weight"])
        raise ValueError(
            f"{source} has another stem: its first convolution is {theirs}, that of this encoder {ours}; "
            "set model.stem to small for 3x3, to imagenet for 7x7"
        )
    alike = [name for name, (theirs, ours) in shapes.items() if theirs == ours]
    # Old files lack the counters of batch norm, which no encoder here reads.
    wrong = {
        "missing": [name for name in own if name not in found and not name.endswith("num_batches_tracked")],
        "unexpected": [name for name in found if name not in own and not name.startswith(head)],
        "of another shape": other,
        "of another kind": [
            name for name in alike if found[name].is_floating_point() != own[name].is_floating_point()
        ],
        "not finite": [name for name in alike if not found[name].isfinite().all()],
    }
    faults = [f"{len(names)} {fault} ({_first(names)})" for fault, names in wrong.items() if names]
    if faults:
        raise ValueError(f"{source} does not fit this encoder; of its tensors {', '.join(faults)}")
    if half := [name for name in alike if found[name].dtype in (torch.float16, torch.bfloat16)]:
        warnings.warn(f"{source} holds {len(half)} tensors in half precision ({_first(half)})", stacklevel=2)
    encoder.load_state_dict({name: found[name] for name in shapes}, strict=False)


def library_encoder(source: str) -> tuple[Backbone, dict[str, Any]] | None:
    """A library's trained encoder, and the size, mean and std of the images that it was trained with.

    Args:
        source: "torchvision:NAME" (its default weights) or "timm:NAME", from the library's cache, for nothing
            is downloaded; "torchvision:NAME:FILE" or "timm:NAME:FILE", see `load_weights`; None for others.

    Raises:
        FileNotFoundError, ValueError: as `frozen_encoder`.
    """
    library, _, rest = source.partition(":")
    name, _, file = rest.partition(":")
    make = {"torchvision": _from_torchvision, "timm": _from_timm}.get(library)
    return None if make is None else make(name, file)


def _from_torchvision(name: str, file: str) -> tuple[Backbone, dict[str, Any]]:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"torchvision has no pretrained encoder {name!r}; choose one such as resnet50")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    encoder = build_backbone(name)
    if file:
        load_weights(encoder, file)
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
        load_weights(encoder, file)
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


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a run folder or a file."""
    if not path.exists():
        raise FileNotFoundError(
            f"there is no file of weights {path}; name a run folder, a file, timm:NAME or torchvision:NAME"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = checkpoint.load_run(path) if path.is_dir() else checkpoint.read(path, legacy=True)
    except (LookupError, SafetensorError, ValueError) as error:  # LookupError: a type that PyTorch has not
        raise ValueError(f"{path} cannot be read as weights alone: {error}") from error
    if _is_dict(found) and isinstance(found.get("method"), Mapping) and isinstance(found.get("encoder"), str):
        within = f"{found['encoder']}."  # our runs say which of their networks it is, one's own methods too
        found = {
            name[len(within) :]: each
            for name, each in found["method"].items()
            if type(name) is str and name.startswith(within)
        }
    for _ in range(3):  # a dict may hold itself
        inner = [key for key in _WRAPPERS if isinstance(found, Mapping) and _is_dict(found.get(key))]
        found = found[inner[0]] if inner else found
    if not _is_dict(found) or not all(type(name) is str and _is_plain(each) for name, each in found.items()):
        held = _first(list(found)) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{path} holds no state dict but {held}; save model.state_dict() alone")
    return dict(found)


def _encoder_in(found: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the encoder among those of a file, by the encoder's own names."""
    found = {re.sub(r"^(module\.|_orig_mod\.|model\.)+", "", name): each for name, each in found.items()}
    best = max(_PREFIXES, key=lambda prefix: sum(prefix + name in found for name in own))
    return {name.removeprefix(best): each for name, each in found.items() if name.startswith(best)}


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor that can be copied into a parameter."""
    is_tensor = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    return is_tensor and not value.is_quantized and not value.is_complex()


def _first(names: list[str]) -> str:
    return ", ".join(map(str, names[:_SHOWN])) + ", ..." * (len(names) > _SHOWN)
