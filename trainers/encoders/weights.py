"""Weights from a file for an encoder of the same library; every tensor must fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..engine import checkpoint

__all__ = ["load_weights"]

_SHOWN = 3  # names of tensors in an error


def load_weights(encoder: nn.Module, classifier: nn.Module, file: Path) -> None:
    """Fill an encoder with the state dict in a file; nothing in the file is executed.

    Args:
        encoder: without a head.
        classifier: the same network with its head. A head of these names in the file is ignored; it may have
            any shape.
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
