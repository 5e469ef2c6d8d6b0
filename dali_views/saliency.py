"""From feature maps to heatmaps and boxes.

Rectangles are (y0, x0, y1, x1) fractions, float32. Nothing here loops over samples or waits for the device.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WRAPPERS = ("module", "_orig_mod")  # what DistributedDataParallel and torch.compile put before a name


class FeatureTap:
    """Keep the last output of one layer of any model, by a forward hook.

    Of a tuple, list or mapping the first tensor is kept, with its graph. Put the tap on before the first
    call of a compiled model: torch.compile does not look for hooks added to a finished graph.

    Args:
        model: any module, also wrapped by DistributedDataParallel or torch.compile.
        layer: dotted name as in ``model.named_modules()``; wrapper prefixes may be left out.

    Raises:
        ValueError: the model has no such layer; names the nearest ones.
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
        """Last output of the layer.

        Raises:
            RuntimeError: the layer has not run since the tap was put on.
        """
        if self._features is None:
            raise RuntimeError(
                f"Layer '{self.layer}' has not run since it was tapped; call the model first, and tap a "
                "compiled model before its first call."
            )
        return self._features

    def remove(self) -> None:
        """Take the hook off; ``features`` stays."""
        self._handle.remove()

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _find_layer(model: nn.Module, layer: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if layer in modules:
        return modules[layer]
    plain: dict[str, nn.Module] = {}
    for name, module in modules.items():
        plain.setdefault(_plain_name(name), module)
    if _plain_name(layer) in plain:
        return plain[_plain_name(layer)]
    names = [name for name in plain if name]
    near = difflib.get_close_matches(layer, names, n=5, cutoff=0.3) or [n for n in names if "." not in n][:5]
    raise ValueError(
        f"{type(model).__name__} has no layer '{layer}'; the nearest names are {', '.join(near)}."
    )


def channel_sum(features: Tensor, prefix_tokens: int = 0, grid: tuple[int, int] | None = None) -> Tensor:
    """Sum over channels, of maps or of a transformer's tokens.

    Args:
        features: (B, C, h, w), or tokens (B, T, C) of a transformer in row order. Channels-last maps
            (B, h, w, C) cannot be told from the former: permute them first.
        prefix_tokens: class and register tokens in front, dropped (tokens only).
        grid: (h, w) of the tokens; without it they must form a square (tokens only).

    Returns:
        float32 (B, h, w), detached.

    Raises:
        ValueError: the shape or the number of tokens does not fit.
    """
    features = features.detach()
    if features.ndim == 4:
        if prefix_tokens or grid is not None:
            raise ValueError(
                f"prefix_tokens and grid are for tokens (B, T, C), not for {tuple(features.shape)}."
            )
        return features.float().sum(1)
    if features.ndim == 3:
        tokens = features.shape[1] - prefix_tokens
        side = math.isqrt(max(tokens, 0))
        height, width = grid or (side, side)
        if prefix_tokens < 0 or tokens < 1 or height * width != tokens:
            raise ValueError(
                f"{features.shape[1]} tokens with prefix_tokens={prefix_tokens} do not form a grid of "
                f"{height} x {width}; set prefix_tokens (class and register tokens) or grid=(h, w)."
            )
        return features[:, prefix_tokens:].float().sum(2).reshape(-1, height, width)
    raise ValueError(f"features have shape {tuple(features.shape)}; give (B, C, h, w) or tokens (B, T, C).")


def activation_map(features: Tensor, prefix_tokens: int = 0, grid: tuple[int, int] | None = None) -> Tensor:
    """Sum over channels, then per-image min-max (ContrastiveCrop, arXiv 2202.03278).

    A map that is constant or not finite becomes all ones, so that its box is the whole image.

    Args:
        features, prefix_tokens, grid: see ``channel_sum``, which also raises its errors.

    Returns:
        float32 (B, h, w) in [0, 1], detached.
    """
    maps = channel_sum(features, prefix_tokens, grid)
    low = maps.amin((1, 2), keepdim=True)
    span = maps.amax((1, 2), keepdim=True) - low
    usable = (span > 0) & span.isfinite()
    return torch.where(usable, (maps - low) / torch.where(usable, span, 1), 1.0)


def upsample(maps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Maps (B, h, w) at another resolution, bilinear: float32 (B, H, W); without a size as they are.

    Raises:
        ValueError: the maps do not have three dimensions.
    """
    if maps.ndim != 3:
        raise ValueError(f"maps have shape {tuple(maps.shape)}; give (B, h, w), as from activation_map.")
    if size is None:
        return maps.float()
    return F.interpolate(maps.float()[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def boxes_from_maps(maps: Tensor, threshold: float = 0.1, size: tuple[int, int] | None = None) -> Tensor:
    """One tight box per map: rows and columns whose maximum exceeds the threshold.

    As the authors' code does (ContrastiveCrop, arXiv 2202.03278, ``update_box``), with one deliberate
    difference: the box ends at the far edge of its last row and column, (last + 1) / H; theirs ends at
    last / H and loses that cell. A map with nothing above the threshold gives the whole image. Their 0.1
    suits post-ReLU convolutions; maps of transformers have a higher floor and need a higher threshold,
    or every box is the whole image.

    Args:
        maps: (B, h, w) in [0, 1], as from ``activation_map``.
        threshold: k.
        size: (H, W) to upsample to first, bilinear; the authors use the network's input size.

    Returns:
        float32 (B, 4).
    """
    hot = upsample(maps, size) > threshold
    y0, y1 = _extent(hot.any(2))
    x0, x1 = _extent(hot.any(1))
    return torch.stack([y0, x0, y1, x1], 1)


def _extent(hot: Tensor) -> tuple[Tensor, Tensor]:
    """First and one-past-last hot cell of each (B, n) row as fractions; (0, 1) where none is hot."""
    n = hot.shape[1]
    cells = torch.arange(n, device=hot.device)
    first = torch.where(hot, cells, n).amin(1)
    last = torch.where(hot, cells, -1).amax(1)
    none = last < 0
    return torch.where(none, 0, first).float() / n, torch.where(none, n, last + 1).float() / n


def heatmaps(
    model: nn.Module,
    images: Tensor,
    layer: str,
    prefix_tokens: int = 0,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Activation maps of a batch in eval mode without gradient; every module's training flag is restored.

    DistributedDataParallel and torch.compile are bypassed: the former would exchange buffers, which
    waits for ranks that may not be here, the latter may not see the hook.

    Args:
        model: any module.
        images: (B, 3, H, W), normalised as in training.
        layer, prefix_tokens, grid: see ``FeatureTap`` and ``channel_sum``.

    Returns:
        float32 (B, h, w) in [0, 1].
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with FeatureTap(model, layer) as tap, torch.no_grad():
            model(images)
            return activation_map(tap.features, prefix_tokens, grid)
    finally:
        for module, training in flags:
            module.training = training
