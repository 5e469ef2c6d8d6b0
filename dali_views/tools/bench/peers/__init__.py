"""What users pick instead of this package, each doing the same task its own way: one file per peer.

A peer's file has `NEEDS`, the modules it imports beyond the package's own requirements, and
`contenders(setup)`. Heavy imports stay inside functions, so that an absent peer costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from ..contender import Contender, Setup

# In the order of the table. The first is what every ratio refers to.
NAMES = (
    "torchvision_pil",
    "torchvision_v2",
    "torchvision_gpu",
    "albumentations_cv2",
    "lightly_moco",
    "solo_learn",
    "spdl_pipeline",
    "ffcv_jpeg",
    "contrastive_crop",
)


def found(setup: Setup, told: Callable[[str], None] = print) -> list[Contender]:
    """The contenders of all peers whose modules are installed; a line to `told` for each that lacks one."""
    contenders = []
    if setup.index.form != "names":
        told("left out: all peers but the first, which read files and know no other images")
    for name in NAMES if setup.index.form == "names" else NAMES[:1]:
        peer = import_module(f"{__name__}.{name}")
        missing = [module for module in peer.NEEDS if find_spec(module) is None]
        if missing:
            told(f"left out: {name} ({', '.join(missing)} not installed; most come with dali-views[bench])")
        else:
            contenders += peer.contenders(setup)
    return contenders
