"""Arguments of a ViewLoader: the spellings that people use become one, and mistakes get a remedy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from ..plan.views import GUIDED, View, complete


def view_list(index: Any, views: Any) -> list[View]:
    """The views, complete, of a loader for `index`.

    Raises:
        TypeError: the index or the views are of another type. ValueError: views that do not fit each other.
    """
    # By an attribute: importing SampleIndex would load what scans folders, shards and tables.
    if not hasattr(index, "fingerprint"):
        found = repr(index) if isinstance(index, str) else f"a {type(index).__name__}"
        example = repr(index) if isinstance(index, str) else '"photos"'
        raise TypeError(
            f"index is {found}; pass a SampleIndex, for instance SampleIndex.from_folder({example})."
        )
    listed: list[Any] = list(views) if isinstance(views, Iterable) else [None]
    for view in listed:
        if not isinstance(view, View):
            found = f"a {type(views).__name__}" + (" with other things" if view is not None else "")
            raise TypeError(
                f"views is {found}; pass a list of views, for instance [View(size=224)] or "
                "recipes.moco_v2(224)."
            )
    return complete(listed)


def warn_unguided(views: list[View]) -> None:
    """Warn that guided views have no boxes, in a loader without a region table."""
    crops = " and ".join(sorted({repr(view.crop) for view in views if view.crop in GUIDED}))
    if crops:
        warnings.warn(
            f"Views with crop {crops} follow the boxes of a region table, and without one they are random "
            "crops; pass regions=RegionTable(len(index)) and write boxes with its update(). For true boxes "
            "of the index: regions.update(*index.largest_boxes()).",
            stacklevel=3,
        )


def dtype_name(dtype: Any) -> str:
    """``"float32"`` or ``"float16"``, for these names and for PyTorch's dtypes.

    Raises:
        ValueError: another dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "float16"):
        raise ValueError(
            f"dtype {name} is neither float32 nor float16. For a model in bfloat16, take float16 views, and "
            "use torch.autocast or call `.bfloat16()` on each view."
        )
    return name
