"""What users choose instead of this package, each doing the same task its own way."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from ..contest import Contender, Report, Setup
from . import dataloaders, ffcv, solo_learn, spdl

BASE = "torchvision PIL"
"""Every ratio refers to this contender, the first."""

PEERS: dict[str, tuple[Callable[[Setup], list[Contender]], tuple[str, ...]]] = {
    "torchvision": (dataloaders.torchvision, ()),
    "albumentations": (dataloaders.albumentations, ("albumentations", "cv2")),
    "lightly": (dataloaders.lightly, ("lightly",)),
    "solo_learn": (solo_learn.contenders, ()),
    "spdl": (spdl.contenders, ("spdl",)),
    "ffcv": (ffcv.contenders, ("ffcv",)),
}
"""The contenders of each peer, and the modules beyond our own requirements that they import at the start."""


def installed(setup: Setup, report: Report = print) -> list[Contender]:
    """The contenders of the installed peers; a line to `report` for each absent peer."""
    if setup.index.form != "names" or any(view.crop in ("whole", "centre") for view in setup.views):
        report("left out: all peers but the first, which make random crops of files only")
        return dataloaders.torchvision(setup)[:1]
    found = []
    for name, (contenders, needs) in PEERS.items():
        missing = [module for module in needs if find_spec(module) is None]
        if missing:
            report(f"left out: {name} ({', '.join(missing)} not installed; most come with dali-views[bench])")
        else:
            found += contenders(setup)
    return found
