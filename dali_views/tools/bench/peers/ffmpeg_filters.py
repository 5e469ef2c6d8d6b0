"""A view as a chain of FFmpeg's filters, of those that every build of it has."""

from __future__ import annotations

import random

from ....plan.views import View
from .random_crop import draw_crop


def filters(height: int, width: int, view: View) -> str:
    """A random chain of filters for one view; colours turn in YUV, brightness and contrast in RGB."""
    y, x, h, w = draw_crop(height, width, view)
    how = "bicubic" if view.interpolation == "cubic" else "bilinear"
    chain = [f"crop={w}:{h}:{x}:{y}:exact=1", f"scale={view.size}:{view.size}:flags={how}"]
    jitter = random.random() < view.jitter
    if random.random() < view.flip:
        chain.append("hflip")
    if random.random() < view.grayscale:
        chain.append("hue=s=0")
    elif jitter:
        turn = random.uniform(-360 * view.hue, 360 * view.hue)
        chain.append(f"hue=h={turn:.2f}:s={_factor(view.saturation):.3f}")
    if random.random() < view.blur:
        chain.append(f"gblur=sigma={random.uniform(*view.sigma):.3f}")
    chain.append("format=rgb24")
    if jitter:
        chain.append(levels(_factor(view.brightness), _factor(view.contrast)))
    if random.random() < view.solarise:
        folded = "if(lt(val,128),val,255-val)"
        chain.append(f"lutrgb='{folded}':'{folded}':'{folded}'")
    return ",".join([*chain, "format=rgb24"])


def levels(brightness: float, contrast: float) -> str:
    """The filter for value -> contrast * (brightness * value - 0.5) + 0.5 within [0, 1]."""
    slope, offset = brightness * contrast + 1e-6, 0.5 * (1 - contrast)
    ends = [min(max(value, 0.0), 1.0) for value in (-offset / slope, (1 - offset) / slope)]
    given = [*ends, *(min(max(slope * end + offset, 0.0), 1.0) for end in ends)]
    names = ("imin", "imax", "omin", "omax")
    pairs = zip(names, given, strict=True)
    return "colorlevels=" + ":".join(f"{c}{name}={value:.4f}" for name, value in pairs for c in "rgb")


def _factor(strength: float) -> float:
    return random.uniform(max(0.0, 1 - strength), 1 + strength)
