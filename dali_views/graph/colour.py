"""Colour, blur, solarise and normalisation of a view as DALI's operators.

The operators of a view are known when the graph is built; a sample that an operator does not apply to gets
neutral parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, types

from ..plan.views import View

_DTYPE = {"float32": types.FLOAT, "float16": types.FLOAT16}


def parameters(view: View) -> list[str]:
    """The parts of a ViewPlan that this view's operators read."""
    names = []
    if view.jitter > 0.0 or view.grayscale > 0.0:
        names += ["matrix", "pivot"]
    if view.blur > 0.0:
        names += ["sigma", "window"]
    if view.solarise > 0.0:
        names += ["solarise"]
    return names


def apply(
    image: Any,
    given: Mapping[str, Any],
    *,
    dtype: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> Any:
    """From (S, S, 3) uint8 views to normalised ones in `dtype`, HWC.

    Args:
        given: graph nodes of the `parameters` of the view.
        mean, std: of RGB, in units of a byte.
    """
    if "matrix" in given:
        image = _colour(image, given["matrix"], given["pivot"])
    if "sigma" in given:
        image = fn.gaussian_blur(image, sigma=given["sigma"], window_size=given["window"])
    if "solarise" in given:
        inverted = image >= _beside(image, given["solarise"])
        # x ^ 255 is 255 - x.
        image = image ^ (fn.cast(inverted, dtype=types.UINT8) * np.uint8(255))
    return fn.crop_mirror_normalize(image, dtype=_DTYPE[dtype], output_layout="HWC", mean=mean, std=std)


def _colour(image: Any, matrix: Any, pivot: Any) -> Any:
    """Brightness, contrast, saturation, hue and grayscale as one linear map, clipped once."""
    grey = fn.reductions.mean(fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY))
    # As an argument of `coord_transform`, the shift would be copied to the CPU, which would wait for it.
    mapped = fn.coord_transform(image, M=matrix, dtype=types.FLOAT) + _beside(image, pivot) * grey
    return fn.reshape(fn.cast(mapped, dtype=types.UINT8), layout="HWC")


def _beside(image: Any, parameter: Any) -> Any:
    """A parameter on the image's device."""
    return parameter.gpu() if image.device == "gpu" else parameter
