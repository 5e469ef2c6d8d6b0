"""The typed configuration of a run; `file` reads it from YAML and writes it."""

from __future__ import annotations

from pydantic import model_validator

from .guides import (
    BoxGuide, ContrastiveCrop, Guide, Localised, NoGuide, OnlineCrop, Saliency, SemanticPairs, SimCCrop, TrueBoxes
)  # fmt: skip
from .methods import BYOL, DINO, LARS, SCFS, SGD, AdamW, Method, MoCo, Optim, SimCLR, SimSiam
from .sections import Data, FineTune, Localise, MapKind, Maps, Model, Probe, Run, Section, Views

__all__ = [
    "BYOL", "DINO", "LARS", "SCFS", "SGD", "AdamW", "BoxGuide", "Config", "ContrastiveCrop", "Data", "FineTune",
    "Guide", "Localise", "Localised", "MapKind", "Maps", "Method", "MoCo", "Model", "NoGuide", "OnlineCrop",
    "Optim", "Probe", "Run", "Saliency", "Section", "SemanticPairs", "SimCCrop", "SimCLR", "SimSiam", "TrueBoxes",
    "Views",
]  # fmt: skip


class Config(Section):
    """A whole training run."""

    run: Run
    """Where, how long and on what the run goes."""
    data: Data
    """Which images there are."""
    views: Views = Views()
    """What a view is."""
    model: Model = Model()
    """The encoder."""
    method: Method = MoCo()
    """The loss with its networks, chosen by `name`."""
    guide: Guide = NoGuide()
    """Who writes the region table, chosen by `name`."""
    optim: Optim = SGD()
    """The optimiser and its schedule, chosen by `name`."""
    localise: Localise = Localise()
    """How evaluations find the object in the encoder's maps."""
    probe: Probe = Probe()
    """How a linear classifier is trained on the frozen encoder afterwards."""
    finetune: FineTune = FineTune()
    """How encoder and classifier are trained on a share of the labels afterwards."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        pairs = isinstance(self.guide, SemanticPairs)
        if pairs != self.views.partner:
            raise ValueError(
                f"views.partner {str(self.views.partner).lower()} does not fit guide.name {self.guide.name}: "
                "the guide semantic_pairs finds partners, and views.partner true shows them"
            )
        if self.box_guide.name != "none" and self.views.crop not in ("contrastive", "inside"):
            raise ValueError(
                f"guide.name {self.box_guide.name} writes boxes that views.crop {self.views.crop} ignores; "
                "set views.crop to contrastive or inside, or guide.name to none"
            )
        if isinstance(self.method, MoCo) and self.method.split_bn and self.optim.batch % self.method.split_bn:
            raise ValueError(
                f"method.split_bn {self.method.split_bn} does not divide optim.batch {self.optim.batch}; "
                "choose a divisor"
            )
        return self

    @property
    def box_guide(self) -> BoxGuide:
        """The guide that writes boxes, alone or beside semantic pairs."""
        return self.guide.boxes if isinstance(self.guide, SemanticPairs) else self.guide

    @property
    def regions(self) -> int:
        """How many regions per image the region table has room for."""
        return self.box_guide.regions if isinstance(self.box_guide, Saliency) else 1
