"""Who writes the region table."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from .sections import Count, CountOrZero, MapKind, Maps, Section, Share

Reading: TypeAlias = Literal["extent", "part", "rectangle"]
Threshold: TypeAlias = Share | Literal["auto", "otsu"]


class NoGuide(Section):
    """No guide: boxes stay the whole image."""

    name: Literal["none"] = "none"


class Boxes(Section):
    """Guides that write boxes."""

    control: Literal["none", "shuffled", "matched"] = "none"
    """Controls that show whether a gain comes from the position of the boxes. shuffled: each image gets the
    boxes of another one; matched: boxes of the same height and width at random places, redrawn every epoch.
    Loss weights of saliency still depend on the image; `temperature` null disables them."""


class Read(Boxes, Maps):
    """Guides that read boxes off maps."""

    threshold: Threshold = "auto"
    """Share of the normalised map above which a pixel is the object; auto: the map's median plus 0.6 of the
    height above it; otsu: each map's own by Otsu's rule (large objects)."""
    skip_whole: bool = True
    """Do not write a box of more than 90 % of its image, because it has no effect: the box before it stays,
    or crops stay random. False: write it, as published."""


class Localised(Read):
    """Guides that read boxes off maps of the encoder in training."""

    warmup: CountOrZero = 0
    """Epochs before the first boxes; 0: before the first step, by the network as it is initialised. In a file
    also a share of the run, such as 20% (published)."""
    interval: Count = 20
    """Epochs between box updates, or a share of the run."""


class Passes(Localised):
    """Guides that pass whole images through the encoder during training."""

    map: MapKind = "activation"
    """As for `localise`; or gradient: channels weighted by the gradient of the method's alignment score
    (ContraCAM)."""
    network: Literal["encoder", "momentum"] = "encoder"
    """Network of the maps: the encoder that is evaluated, or the momentum network of MoCo, BYOL and DINO."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Weight of a new map against the average of an image's earlier ones; 1: only the newest (published)."""
    map_size: Count = 16
    """Cells along each side of the map kept per image (two bytes a cell, on the device): by contrastive_crop
    if `rate` is below 1, by saliency always."""

    @model_validator(mode="after")
    def _gradients_reach_the_network(self) -> Passes:
        if self.map == "gradient" and self.network == "momentum":
            raise ValueError("guide.map gradient needs the network that learns; set guide.network to encoder")
        return self


class ContrastiveCrop(Passes):
    """Boxes from the encoder's own maps of whole images, arXiv 2202.03278."""

    name: Literal["contrastive_crop"] = "contrastive_crop"
    reading: Reading = "part"
    """How a box is read off a map, see `boxes_from_maps`."""


class FrozenBoxes(Read):
    """Boxes written once, before training, by an encoder that does not learn (ours)."""

    name: Literal["frozen_boxes"] = "frozen_boxes"
    encoder: str = "untrained"
    """Network of the maps: untrained (as it is initialised), a run folder, or timm:NAME[:FILE] or
    torchvision:NAME[:FILE] (of weights)."""
    map: Literal["activation", "principal"] = "activation"
    """As for `localise`."""
    reading: Reading = "part"
    """How the box is read off a map, see `boxes_from_maps`; with several regions each part has its own."""
    regions: Count = 1
    """Boxes kept per image, with weights: connected parts of the map, see `regions_from_maps`."""
    min_area: Share = 0.01
    """Least area of a part, as a share of the image."""


class OnlineCrop(Localised):
    """ContrastiveCrop's boxes from a first pass, then from maps of the views seen in training (ours)."""

    name: Literal["online_crop"] = "online_crop"
    size: Count | None = None
    """Side in pixels of the square to which whole images are resized for the first pass, and on which boxes
    are read off a map; absent: the size of the views."""
    interval: Count = 1
    """Epochs between box updates, which cost almost nothing here."""
    map_size: Count = 16
    """Cells along each side of the map that is kept per image (two bytes a cell, on the device)."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Weight of a new view against the average of earlier ones, cell by cell."""
    reading: Reading = "part"
    """How a box is read off a map, see `boxes_from_maps`."""


class Saliency(Passes):
    """Regions and loss weights from a saliency map, arXiv 2302.11461 (all but the idea is ours)."""

    name: Literal["saliency"] = "saliency"
    regions: Count = 3
    """Regions kept per image: connected parts of the map above the threshold."""
    min_area: Share = 0.01
    """Least area of a part, as a share of the image."""
    temperature: Annotated[float, Field(ge=0.002, allow_inf_nan=False)] | None = 0.5
    """Temperature of the loss weights, exp(saliency / temperature); null (infinite) weights all losses
    equally."""


class TrueBoxes(Boxes):
    """Each image's largest true box from the first epoch on: about the upper bound for boxes (a control)."""

    name: Literal["true_boxes"] = "true_boxes"


class SimCCrop(Boxes):
    """One fixed centre box for all images from the first epoch on, arXiv 2202.03278."""

    name: Literal["simccrop"] = "simccrop"
    box: tuple[Share, Share, Share, Share] = (0.25, 0.25, 0.75, 0.75)
    """y0, x0, y1, x1 as fractions of the image."""


BoxGuide = Annotated[
    NoGuide | ContrastiveCrop | OnlineCrop | FrozenBoxes | SimCCrop | TrueBoxes | Saliency,
    Field(discriminator="name"),
]
"""Guides that write boxes and weights."""


class SemanticPairs(Section):
    """Another image of the same content as the second view, arXiv 2306.16122."""

    name: Literal["semantic_pairs"] = "semantic_pairs"
    encoder: str | None = None
    """Encoder that measures similarity: a run folder, timm:NAME[:FILE] or torchvision:NAME[:FILE]
    (weights)."""
    band: tuple[float, float] = (0.97, 0.99)
    """Least and greatest similarity of a pair; the upper end leaves near-duplicates out."""
    band_kind: Literal["absolute", "quantile"] = "absolute"
    """Whether `band` holds cosines, or quantiles of the cosines of random pairs."""
    anchors: Share = 1.0
    """Share of the images for which a partner is searched."""
    share: Share = 0.5
    """Share of the images that are paired with their partner, redrawn every epoch; others stay unpaired."""
    mask: bool = True
    """Partners, and images with one partner in common, are not negatives (SimCLR, MoCo)."""
    control: Literal["none", "random", "label"] = "none"
    """random: random partners, which should lower accuracy; label: random ones of the same class. With an
    encoder, only images with a partner are paired, so the number of pairs is the same."""
    boxes: BoxGuide = NoGuide()
    """A guide for the boxes: views of an image and of its partner then follow each image's own."""

    @model_validator(mode="after")
    def _knows_its_encoder(self) -> SemanticPairs:
        if self.control == "none" and self.encoder is None:
            raise ValueError(
                "guide.encoder is missing; name a run folder, timm:NAME[:FILE] or torchvision:NAME[:FILE]"
            )
        return self


Guide = Annotated[
    NoGuide | ContrastiveCrop | OnlineCrop | FrozenBoxes | SimCCrop | TrueBoxes | Saliency | SemanticPairs,
    Field(discriminator="name"),
]
"""Who writes the region table."""
