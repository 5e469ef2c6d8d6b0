"""Alignment: where in the image the cells of a layer look, and maps resampled to where their cells lie.

A convolution of stride 2, kernel 3 and padding 1 centres output i at input 2 i, not at 2 i + 0.5. After the
stages of a ResNet a cell looks almost half a cell above and left of the square that is drawn for it:

    cells as drawn      |  0  |  1  |  2  |  3  |
    centres of a ResNet 0     1     2     3           offset -0.5 cells
    centres of a ViT       0     1     2     3        offset 0

`cell_centres` finds the centres exactly, by sending the coordinates of the pixels through the network.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Centres", "align", "cell_centres"]

_TOLERANCE = 0.05  # of a cell: most centres lie as near to an even grid, or the layer has none


class Centres(NamedTuple):
    """Centres of the cells of a map, on an even grid: cell (i, j) looks at start + (i, j) * step."""

    start: tuple[float, float]
    """y, x of the centre of cell (0, 0), as fractions of the image."""
    step: tuple[float, float]
    """Distance between neighbours along y and x, as fractions of the image."""


def align(maps: Tensor, centres: Centres | None, size: tuple[int, int] | None = None) -> Tensor:
    """Maps (B, h, w) resampled (cubic) so that cell (i, j) is the square [i/H, (i+1)/H) x [j/W, (j+1)/W).

    Args:
        centres: where the cells look; None returns the maps as they are.
        size: (H, W) of the result; that of the maps if absent.

    Returns:
        float32 (B, H, W). Beyond the outermost centres the nearest value is repeated.
    """
    if centres is None:
        return maps.float()
    places = []
    for cells, count, start, step in zip(maps.shape[1:], size or maps.shape[1:], *centres, strict=True):
        wanted = (torch.arange(count, device=maps.device) + 0.5) / count
        places.append(((wanted - start) / step + 0.5) / cells * 2 - 1)  # in grid_sample's units
    y, x = torch.meshgrid(*places, indexing="ij")
    grid = torch.stack([x, y], -1).expand(len(maps), -1, -1, -1)
    return F.grid_sample(
        maps.float()[:, None], grid, mode="bicubic", padding_mode="border", align_corners=False
    )[:, 0]


_known: WeakKeyDictionary[nn.Module, dict[object, Centres | None]] = WeakKeyDictionary()


def cell_centres(
    model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor, key: object
) -> Centres | None:
    """Where the cells of a layer look; found once per model, key and shape of the input.

    Works for any network whose layers are PyTorch's: each operator is replaced by what it does to places.
    A convolution averages the places in its window, attention leaves each token where it is, activations and
    normalisation change nothing, and borders go on evenly. So weights do not matter, and a border is exact.

    Args:
        model: the network, in eval mode; neither compiled nor wrapped.
        run: images (B, C, H, W) -> features (B, C', h, w) of the layer.
        images: a batch of inputs, of which only shape, type and device count.
        key: what tells this layer from other layers of the model.

    Returns:
        None, after a warning, where the centres do not lie on an even grid or cannot be found.
    """
    found = _known.setdefault(model, {})
    key = (key, *images.shape[1:])
    if key not in found:
        try:
            found[key] = _trace(run, images)
        except Exception as error:  # any code of a foreign network may fail on what is no image
            found[key] = None
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
        else:
            reason = "its cells do not lie on an even grid"
        if found[key] is None:
            warnings.warn(
                f"Maps of {type(model).__name__} are not aligned with the image ({reason}); boxes may be up "
                "to half a cell off.",
                stacklevel=3,
            )
    return found[key]


def _trace(run: Callable[[Tensor], Tensor], images: Tensor) -> Centres | None:
    channels, height, width = images.shape[1:]
    rulers = torch.zeros(4, channels, height, width, device=images.device)
    rulers[0] = ((torch.arange(height, device=images.device) + 0.5) / height)[:, None]
    rulers[1] = (torch.arange(width, device=images.device) + 0.5) / width
    rulers[2] = 1
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False), _Places():
        found = run(rulers).double()
    # What a layer adds (positional embeddings) stands in the last image; what it multiplies by, in the third.
    y, x, one = (found[:3] - found[3:]).mean(1).cpu()
    start_y, step_y = _even(y / one) or (0.0, 0.0)
    start_x, step_x = _even((x / one).T) or (0.0, 0.0)
    return Centres((start_y, start_x), (step_y, step_x)) if step_y and step_x else None


def _even(places: Tensor) -> tuple[float, float] | None:
    """Start and step of places (n, m) along the first axis; None if they are not even."""
    count = len(places)
    cells = torch.arange(count)[:, None]
    step = (places[1:] - places[:-1]).median().item() if count > 1 else 1.0
    start = (places - cells * step).median().item()
    near = ((places - cells * step - start).abs() < _TOLERANCE * abs(step)).float().mean()
    return (start, step) if step > 0 and near > 0.5 else None


# Operators by name, in all their spellings: torch.relu_, Tensor.relu, functional.relu.
_UNMOVED = {
    *("relu", "relu6", "gelu", "silu", "hardtanh", "hardswish", "mish", "leaky_relu", "elu", "celu", "selu"),
    *("prelu", "softplus", "tanh", "clamp", "normalize", "dropout", "dropout2d"),
    *("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "local_response_norm"),
}
_GATES = {"sigmoid", "hardsigmoid", "norm", "vector_norm"}  # factors at a place, not places


class _Places(TorchFunctionMode):
    """Operators act on coordinates: see `cell_centres`. Channels all hold the same."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in _UNMOVED:
            return args[0] if args else kwargs["input"]
        if name in _GATES:
            return torch.ones_like(func(*args, **kwargs))
        if name == "softmax" and args[0].ndim > 1 and args[0].shape[-1] == args[0].shape[-2]:
            return torch.eye(args[0].shape[-1], device=args[0].device).expand(args[0].shape).contiguous()
        own = getattr(self, f"_{name}", None)
        return func(*args, **kwargs) if own is None else own(*args, **kwargs)

    def _scaled_dot_product_attention(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        # Keys of a coarser grid are at other places; the residual branch keeps those of the queries.
        return value if value.shape[-2] == query.shape[-2] else torch.zeros_like(query)

    def _multi_head_attention_forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        return value, None

    def _mul(self, input: Any, other: Any) -> Any:
        # A gated unit multiplies two branches of the same place; a scale has another shape.
        alike = isinstance(input, Tensor) and isinstance(other, Tensor) and input.shape == other.shape
        return input if alike else torch.mul(input, other)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return input.mean(-1, keepdim=True).expand(*input.shape[:-1], len(weight)).contiguous()

    def _pad(self, input: Tensor, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Tensor:
        if input.ndim == 4 and len(pad) == 4:
            return _extend(input, (pad[2], pad[3]), (pad[0], pad[1]))
        return F.pad(input, list(pad))

    def _conv2d(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        found = _window(input, weight.shape[2:], stride, padding, dilation)
        return found.expand(-1, len(weight), -1, -1).contiguous()

    def _max_pool2d(
        self, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Tensor:  # fmt: skip
        found = _window(input, kernel_size, stride or kernel_size, padding, dilation, ceil_mode)
        return found.expand(-1, input.shape[1], -1, -1).contiguous()

    _boolean_dispatch = _max_pool2d

    def _avg_pool2d(
        self, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        *_: Any, **__: Any,
    ) -> Tensor:  # fmt: skip
        return self._max_pool2d(input, kernel_size, stride, padding, 1, ceil_mode)


def _window(
    input: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool = False
) -> Tensor:
    """(B, 1, h, w) mean of the places in the window of each cell."""
    kernel, stride, dilation = _pair(kernel), _pair(stride), _pair(dilation)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        sides = [(p, p) for p in _pair(0 if padding == "valid" else padding)]
    input = _extend(input[:, :1], *sides)
    if ceil_mode:
        left = [(n - 1 - r) % s for n, r, s in zip(input.shape[2:], reach, stride, strict=True)]
        input = _extend(input, *((0, (s - rest) % s) for rest, s in zip(left, stride, strict=True)))
    mean = input.new_full((1, 1, *kernel), 1 / (kernel[0] * kernel[1]))
    return F.conv2d(input, mean, stride=stride, dilation=dilation)


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return cast(tuple[int, int], values * 2 if len(values) == 1 else values)


def _extend(input: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """The last two axes continued evenly at both ends; a negative number cuts."""
    for axis, (before, after) in ((-2, rows), (-1, columns)):
        begin, end = max(-before, 0), input.shape[axis] - max(-after, 0)
        input = input.narrow(axis, begin, end - begin)
        last = input.shape[axis] - 1
        cells = torch.arange(-max(before, 0), last + 1 + max(after, 0), device=input.device)
        inner = cells.clamp(0, last)
        shape = [-1, 1] if axis == -2 else [-1]
        beyond = (cells - inner).view(shape).to(input.dtype)
        # The slope at either end, the same on a ruler.
        slope = (input.narrow(axis, last, 1) - input.narrow(axis, 0, 1)) / max(last, 1)
        input = input.index_select(axis, inner) + beyond * slope
    return input
