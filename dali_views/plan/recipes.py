"""The published sets of views, by the name of the method that made them standard.

Each function returns the views of one sample in order. Some arguments change how the crops are chosen and
leave the photometric part as published, as ContrastiveCrop (arXiv 2202.03278, section 4) does. They have the
same meaning in all recipes:

- `crop`, `alpha`, `scale`: of all views; see `View`.
- `second_crop`: the crop of the second view, where it differs from `crop`.
- `dilate`: how much the box is enlarged for the first and for the second view. `crop="inside"` with (1, 1.5)
  is an object and its surroundings (Object-Aware Cropping, arXiv 2112.00319: MoCo v2 on a part of OpenImages
  with several objects an image, 49.8 -> 58.6 mAP). Growth about the centre and the factor 1.5 are ours. The
  public code moves each edge by a fifth of its own coordinate, widens boxes below 224 pixels, and swaps the
  two views at random.
- `joint`: JointCrop's beta for the areas of the first two views; see `joint`.
- `vflip`, `rotate90`: of all views, see `View`; for images without an orientation, such as aerial ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace

from .views import View

Range = tuple[float, float]


def moco_v2(
    size: int = 224,
    *,
    crop: str = "random",
    alpha: float = 0.6,
    scale: Range = (0.2, 1.0),
    blur: float = 0.5,
    second_crop: str | None = None,
    dilate: Range = (1.0, 1.0),
    joint: float | None = None,
    vflip: float = 0.0,
    rotate90: float = 0.0,
) -> list[View]:
    """Two equal views (MoCo v2, arXiv 2003.04297; SimSiam uses the same). `blur=0` for small images."""
    view = View(
        size=size,
        crop=crop,
        alpha=alpha,
        scale=scale,
        flip=0.5,
        vflip=vflip,
        rotate90=rotate90,
        jitter=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        grayscale=0.2,
        blur=blur,
        dilate=dilate[0],
        joint=joint,
    )
    return [view, replace(view, crop=second_crop or crop, dilate=dilate[1])]


def simclr(
    size: int = 224,
    *,
    crop: str = "random",
    alpha: float = 0.6,
    scale: Range = (0.08, 1.0),
    blur: float = 0.5,
    second_crop: str | None = None,
    dilate: Range = (1.0, 1.0),
    joint: float | None = None,
    vflip: float = 0.0,
    rotate90: float = 0.0,
) -> list[View]:
    """MoCo v2's views with twice the colour (SimCLR, arXiv 2002.05709, appendix A)."""
    views = moco_v2(
        size,
        crop=crop,
        alpha=alpha,
        scale=scale,
        blur=blur,
        second_crop=second_crop,
        dilate=dilate,
        joint=joint,
        vflip=vflip,
        rotate90=rotate90,
    )
    return [replace(view, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2) for view in views]


def byol(
    size: int = 224,
    *,
    crop: str = "random",
    alpha: float = 0.6,
    scale: Range = (0.08, 1.0),
    blur: float | None = None,
    second_crop: str | None = None,
    dilate: Range = (1.0, 1.0),
    joint: float | None = None,
    vflip: float = 0.0,
    rotate90: float = 0.0,
) -> list[View]:
    """Two unequal views: one always blurred, the other sometimes solarised (BYOL, arXiv 2006.07733).

    `blur` replaces the probability of both (1 and 0.1).
    """
    views = moco_v2(
        size,
        crop=crop,
        alpha=alpha,
        scale=scale,
        second_crop=second_crop,
        dilate=dilate,
        joint=joint,
        vflip=vflip,
        rotate90=rotate90,
    )
    first, second = (replace(view, interpolation="cubic", saturation=0.2) for view in views)
    first = replace(first, blur=1.0 if blur is None else blur)
    return [first, replace(second, blur=0.1 if blur is None else blur, solarise=0.2)]


def dino(
    size: int = 224,
    *,
    crop: str = "random",
    alpha: float = 0.6,
    scale: Range = (0.14, 1.0),
    blur: float | None = None,
    second_crop: str | None = None,
    dilate: Range = (1.0, 1.0),
    joint: float | None = None,
    vflip: float = 0.0,
    rotate90: float = 0.0,
    local_crop: str | None = None,
    local_size: int = 96,
    local_scale: Range = (0.05, 0.14),
    locals: int = 8,
) -> list[View]:
    """Multi-crop: two global views, then `locals` small ones (DINO, arXiv 2104.14294, as for ResNet-50).

    `local_crop` (default: `crop`) and `alpha` apply to the local views, whose box is never enlarged (our
    choice); `blur` replaces the probability of all (1, 0.1, and 0.5 for the local views).
    """
    first, second = byol(
        size,
        crop=crop,
        alpha=alpha,
        scale=scale,
        blur=blur,
        second_crop=second_crop,
        dilate=dilate,
        joint=joint,
        vflip=vflip,
        rotate90=rotate90,
    )
    local = replace(first, crop=local_crop or crop, dilate=1.0, joint=None)
    local = replace(local, size=local_size, scale=local_scale, blur=0.5 if blur is None else blur)
    return [first, second, *[local] * locals]


def evaluation(size: int = 224, *, centre_share: float = 0.875) -> list[View]:
    """One plain view: the central square, as by Resize(256) and CenterCrop(224)."""
    return [View(size=size, crop="centre", centre_share=centre_share)]


def localisation(size: int = 224) -> list[View]:
    """One plain view of the whole image, resized to a square: the input of ContrastiveCrop's localisation."""
    return [View(size=size, crop="whole")]


PARTNER = ("none", "replace", "add")


def with_partner(views: list[View], how: str) -> list[View]:
    """Two or more views, one of them of the sample's semantic partner (arXiv 2306.16122).

    Args:
        how: ``"replace"``: the second view is cut from the partner; ``"add"``: one more view like it is, as
            the last; ``"none"``: no view is.
    """
    if how == "none":
        return views
    second = replace(views[1], partner=True)
    return [*views, second] if how == "add" else [views[0], second, *views[2:]]


BY_NAME: dict[str, Callable[..., list[View]]] = {
    recipe.__name__: recipe for recipe in (moco_v2, simclr, byol, dino, evaluation, localisation)
}


def not_taken(name: str, settings: Iterable[str]) -> list[str]:
    """The settings that the recipe of this name does not take."""
    taken = inspect.signature(BY_NAME[name]).parameters
    return [key for key in settings if key not in taken]
