"""FeatureTap: the output of one layer of any model, by a forward hook."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_WRAPPERS = ("module", "_orig_mod")  # what DistributedDataParallel and torch.compile put before a name


class FeatureTap:
    """Keeps the last output of one layer of any model, with its graph.

    Of a tuple, list or mapping it keeps the first tensor. Tap a compiled model before its first call:
    torch.compile does not see hooks that are added to a finished graph.

    Args:
        model: any module, also wrapped by DistributedDataParallel or torch.compile.
        layer: dotted name as in ``model.named_modules()``; wrapper prefixes may be left out.

    Raises:
        ValueError: the model has no such layer; names those spelled like it, or else the model's parts.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        self.layer = layer
        self._features: Tensor | None = None
        self._handle = _find_layer(model, layer).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            parts = output.values() if isinstance(output, Mapping) else output
            output = next((part for part in parts if isinstance(part, Tensor)), None)
        if output is None:
            raise TypeError(f"Layer '{self.layer}' returned no tensor; tap a layer that does.")
        self._features = output

    @property
    def features(self) -> Tensor:
        """Last output of the layer; a RuntimeError if it has not run since it was tapped."""
        if self._features is None:
            raise RuntimeError(
                f"Layer '{self.layer}' has not run since it was tapped; call the model first, and tap a "
                "compiled model before its first call."
            )
        return self._features

    def remove(self) -> None:
        """Remove the hook; ``features`` stays."""
        self._handle.remove()

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _find_layer(model: nn.Module, layer: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    plain: dict[str, nn.Module] = {}
    for name, module in modules.items():
        plain.setdefault(_plain_name(name), module)
    found = modules.get(layer, plain.get(_plain_name(layer)))
    if found is not None:
        return found
    names = [name for name in plain if name]
    near = ", ".join(difflib.get_close_matches(layer, names, n=5, cutoff=0.6))
    hint = f"the nearest names are {near}" if near else f"its parts are {_parts(names)}"
    raise ValueError(f"{type(model).__name__} has no layer '{layer}'; {hint}.")


def _parts(names: list[str]) -> str:
    """The top names, each with the outermost series of numbered layers in it: maps lie between those."""
    lengths = Counter(parent for parent, _, last in (n.rpartition(".") for n in names) if last.isdecimal())
    series = {
        name: f"{name}.0 to {name}.{length - 1}"
        for name, length in lengths.items()
        if length > 1 and not any(part.isdecimal() for part in name.split(".")[1:])
    }
    found = []
    for top in (name for name in names if "." not in name):
        inside = [text for name, text in series.items() if name.split(".")[0] == top]
        found.append(f"{top} ({', '.join(inside)})" if inside else top)
    return ", ".join(found)
