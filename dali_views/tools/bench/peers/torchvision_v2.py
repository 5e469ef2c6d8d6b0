"""torchvision alone, on uint8 tensors from file to view, in a DataLoader."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from ....plan.views import View
from ..contender import Batches, Contender, Setup
from .data_loader import Views, loader_batches
from .torchvision_pil import cut, normalised, photometric

NEEDS: tuple[str, ...] = ()


def contenders(setup: Setup) -> list[Contender]:
    """Decoding and transforms of torchvision, without PIL."""

    def start() -> Batches:
        dataset = Views(setup.index, opened, [transform(view) for view in setup.views])
        return loader_batches(dataset, setup)

    note = blur_note(setup.views)
    return [Contender("torchvision v2 tensors", "peer", "cpu", start, len(setup.views), note)]


def opened(path: str) -> Tensor:
    """uint8 (3, H, W); PIL opens the formats that torchvision cannot decode."""
    try:
        image: Tensor = decode_image(path, ImageReadMode.RGB)
    except RuntimeError:
        image = v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))
    return image


def transform(view: View) -> Callable[[Tensor], Tensor]:
    """A view of a uint8 tensor, on the device that holds it."""
    blur = v2.GaussianBlur(window(view), view.sigma)
    composed: Callable[[Tensor], Tensor] = v2.Compose([*cut(view), *photometric(view, blur), *normalised()])
    return composed


def window(view: View) -> int:
    """Pixels of the blur's kernel, fixed per data set in torchvision: room for the widest blur."""
    return 2 * math.ceil(3 * view.sigma[1]) + 1


def blur_note(views: Sequence[View]) -> str:
    """How this blur differs, where there is one."""
    widths = sorted({window(view) for view in views if view.blur})
    return f"blurs with {' and '.join(map(str, widths))} taps, however little" if widths else ""
