"""Where a crop lies, for peers that draw it in Python: as RandomResizedCrop or as ContrastiveCrop."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from ....plan.views import View

Rectangle = tuple[int, int, int, int]


def draw_crop(height: int, width: int, view: View, box: Sequence[float] | None = None) -> Rectangle:
    """Top, left, height and width in pixels of a random crop of an image.

    Args:
        height, width: of the image.
        view: whose scale, ratio and alpha hold.
        box: (y0, x0, y1, x1), fractions of the image, in which the crop's centre lies as far as the
            image's border allows, by Beta(alpha, alpha). None draws the place uniformly.
    """
    for _ in range(10):
        area = height * width * random.uniform(*view.scale)
        ratio = math.exp(random.uniform(math.log(view.ratio[0]), math.log(view.ratio[1])))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            break
    else:  # the widest crop that the ratio allows, in the middle
        ratio = min(max(width / height, view.ratio[0]), view.ratio[1])
        h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
        return (height - h) // 2, (width - w) // 2, h, w
    if box is None:
        return random.randint(0, height - h), random.randint(0, width - w), h, w
    return _place(height, h, box[0], box[2], view.alpha), _place(width, w, box[1], box[3], view.alpha), h, w


def _place(whole: int, part: int, low: float, high: float, alpha: float) -> int:
    """Start of a part of the whole, its middle between two fractions of the whole."""
    first, last = (min(max(int(whole * end) - part // 2, 0), whole - part) for end in (low, high))
    return first + int((last - first) * random.betavariate(alpha, alpha))
