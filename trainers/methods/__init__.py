"""Methods, one file each; which one a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainers import config as cfg
from trainers.data import training_views
from trainers.encoders.backbones import Backbone, build_backbone, check_sizes

from .byol import BYOL
from .dino import DINO
from .lejepa import LeJEPA
from .method import Method
from .moco import MoCo
from .scfs import SCFS
from .simclr import SimCLR
from .simsiam import SimSiam

__all__ = ["METHODS", "Method", "build_method", "method_of"]

METHODS: dict[str, Callable[[Backbone, Any], Method]] = {
    "simclr": SimCLR, "moco": MoCo, "byol": BYOL, "simsiam": SimSiam, "dino": DINO, "scfs": SCFS,
    "lejepa": LeJEPA,
}  # fmt: skip
"""By `method.name`: called with the backbone and the method's section of the configuration."""


def build_method(config: cfg.Method, backbone: Backbone) -> Method:
    """The method of a configuration around a backbone."""
    return METHODS[config.name](backbone, config)


def method_of(config: cfg.Config, own: Callable[[Backbone, Any], Method] | None = None) -> Method:
    """Encoder and method of a run, with initial weights from torch's global generator.

    Args:
        own: what `method.name` own stands for, called as the classes of `METHODS` are.

    Raises:
        ValueError: it is missing or not asked for, or its views or sizes do not fit.
    """
    if (own is not None) != isinstance(config.method, cfg.Own):
        raise ValueError(
            f"method.name {config.method.name} does not fit the method that is given: with your own class, "
            "pretrain(config, own_method=CLASS), the name is own; a file or a command loads no code"
        )
    views = training_views(config.views)
    sizes = [view.size for view in (views[:-1] if config.views.partner == "add" else views)]
    backbone = build_backbone(config.model.backbone, config.model.stem, config.model.zero_init_residual)
    check_sizes(backbone, set(sizes))
    method = build_method(config.method, backbone) if own is None else own(backbone, config.method)
    method.check_views(sizes)
    return method
