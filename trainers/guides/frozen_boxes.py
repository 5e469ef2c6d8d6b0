"""Boxes written once, before training, by an encoder that does not learn (ours).

A network that trains on crops of backgrounds looks less and less at objects, and its boxes get worse. Boxes
of a frozen encoder do not. Related: object crops from a frozen extractor (arXiv 2112.00319, 2506.05409).
"""

from __future__ import annotations

from dataclasses import replace

from dali_views import RegionTable

from .. import config as cfg
from ..encoders.backbones import Backbone
from ..encoders.frozen import frozen_encoder
from ..methods import Method
from .guide import Guide
from .reading import localise

__all__ = ["FrozenBoxes"]


class FrozenBoxes(Guide):
    """One pass before the first step, by an encoder of its own or by the network as it is initialised.

    An encoder that was trained elsewhere sees images at its own size and normalisation, unless the
    configuration has another size.
    """

    config: cfg.FrozenBoxes

    def begin(self, regions: RegionTable) -> None:
        training, encoder = self.training, self.config.encoder
        network: Method | Backbone = training.method
        if encoder != "untrained":
            network, views = frozen_encoder(training.views, encoder, training.setting.device)
            training = replace(training, views=views)
        localise(training, network, self.config, regions)
        self.passes += 1
