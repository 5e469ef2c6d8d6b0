"""Who writes the region table."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .section import Count, CountOrZero, Section, Share


class NoGuide(Section):
    """Nobody writes the region table: boxes stay the whole image."""

    name: Literal["none"] = "none"


class ContrastiveCrop(Section):
    """Boxes from the encoder's own activation maps, arXiv 2202.03278."""

    name: Literal["contrastive_crop"] = "contrastive_crop"
    warmup: CountOrZero = 20
    """Epochs before the first boxes."""
    interval: Count = 20
    """Epochs between box updates."""
    threshold: Share = 0.1
    """Share of the min-max normalised map above which a pixel belongs to the object."""
    layer: str | None = None
    """Dotted name of the module whose output is the map; absent: the backbone's last spatial one."""
    size: Count | None = None
    """Pixels to which the whole image is squashed before it is localised; absent: the size of the views."""


class OnlineCrop(ContrastiveCrop):
    """ContrastiveCrop's boxes from the maps of the views seen in training, without a pass (ours)."""

    name: Literal["online_crop"] = "online_crop"  # type: ignore[assignment]
    interval: Count = 1
    """Epochs between box updates, which cost next to nothing here."""
    map_size: Count = 14
    """Cells along each side of the map that is kept per image (two bytes a cell, on the device)."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Weight of a new view against the average of earlier ones, cell by cell."""


class Saliency(ContrastiveCrop):
    """Regions and loss weights from a saliency map, arXiv 2302.11461 (all but the idea is ours)."""

    name: Literal["saliency"] = "saliency"  # type: ignore[assignment]
    map: Literal["activation", "gradient"] = "activation"
    """activation: the sum of the encoder's channels; gradient: channels weighted by the gradient of the
    method's own alignment score (ContraCAM)."""
    threshold: Share = 0.5
    """Share of the min-max normalised map above which a pixel belongs to a region."""
    regions: Count = 3
    """Regions kept per image: connected parts of the map above the threshold."""
    min_area: Share = 0.01
    """Least area of a part, as a share of the image."""
    temperature: Annotated[float, Field(ge=0.002, allow_inf_nan=False)] | None = 0.5
    """Of the loss weights, exp(saliency / temperature); null, which is infinite, weighs all losses alike."""
    map_size: Count = 14
    """Cells along each side of the map that is kept per image to score crops by."""


class SemanticPairs(Section):
    """Another image of the same content as the second view, arXiv 2306.16122."""

    name: Literal["semantic_pairs"] = "semantic_pairs"
    encoder: str | None = None
    """What measures similarity: a run folder, or timm:NAME[:FILE] or torchvision:NAME[:FILE] (of weights)."""
    band: tuple[float, float] = (0.97, 0.99)
    """Least and greatest similarity of a pair; the upper end leaves near-duplicates out."""
    band_kind: Literal["absolute", "quantile"] = "absolute"
    """Whether `band` holds cosines, or quantiles of the cosines of random pairs."""
    anchors: Share = 1.0
    """Share of the images that a partner is sought for."""
    share: Share = 0.5
    """Share of the images that are paired with their partner, drawn anew every epoch; others stay alone."""
    mask: bool = True
    """Leave an image's partner out of its negatives (SimCLR, MoCo)."""
    control: Literal["none", "random", "label"] = "none"
    """random: partners at random, which must hurt; label: random partners of the same class."""

    @model_validator(mode="after")
    def _knows_its_encoder(self) -> SemanticPairs:
        if self.control == "none" and self.encoder is None:
            raise ValueError(
                "guide.encoder is missing; name a run folder, timm:NAME or torchvision:NAME to find partners"
            )
        return self


class SimCCrop(Section):
    """One fixed centre box for all images from the first epoch on, arXiv 2202.03278."""

    name: Literal["simccrop"] = "simccrop"
    box: tuple[Share, Share, Share, Share] = (0.25, 0.25, 0.75, 0.75)
    """y0, x0, y1, x1 as fractions of the image."""


Guide = Annotated[
    NoGuide | ContrastiveCrop | OnlineCrop | SimCCrop | Saliency | SemanticPairs, Field(discriminator="name")
]
