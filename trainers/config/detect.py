"""The section of a detector that is trained on an encoder afterwards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .sections import Count, CountOrZero, NotNegative, Positive, Section, Share


class Detect(Section):
    """A detector (Faster R-CNN, with masks Mask R-CNN) on the encoder, with a feature pyramid."""

    instances: tuple[str, ...] = ()
    """Objects of the training images: COCO's JSON, or lists of VOC's images, such as
    VOC2007/ImageSets/Main/trainval.txt; absent: `data.instances`."""
    val_path: str | None = None
    """Test images of the kind `data.kind`; absent: the folder of the training images."""
    val_instances: tuple[str, ...] = ()
    """Objects of the test images; absent: those of the share `data.val_share` of the images, held out."""
    masks: bool | None = None
    """Also train masks; absent: if every object has one."""
    size: Count = 800
    """Short side of an image in pixels."""
    longest: Count = 1333
    """Most pixels of its long side; the short side is then below `size`."""
    shorts: tuple[Count, ...] = ()
    """Short sides in training of which each image gets one; absent: `size`."""
    anchors: tuple[Count, Count, Count, Count, Count] = (32, 64, 128, 256, 512)
    """Sides of the squares in pixels of the view that boxes are measured against, by level of the pyramid."""
    width: Count = 256
    """Channels of pyramid and mask head; the box head's layers have four times as many."""
    proposals: Count = 1000
    """Largest number of boxes of an image that the first stage passes to the heads."""
    rois: Count = 512
    """Proposals of an image on which the heads are trained."""
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 0
    """First stages that do not learn, batch norm's statistics included: 1 is stem and layer1, ..."""
    norm: Literal["sync", "batch", "frozen"] = "sync"
    """Batch norm of encoder and pyramid: over all GPUs, over those of each process, or as pretrained (then
    the pyramid has none)."""
    batch: Count = 16
    """Images per step over all processes."""
    lr: Positive = 0.02
    """Learning rate after the warm-up."""
    momentum: Share = 0.9
    """Momentum of SGD."""
    weight_decay: NotNegative = 1e-4
    """Decay rate of the weights; scales and shifts of batch norm have none."""
    steps: Count = 90_000
    """Optimiser steps."""
    drops: tuple[Count, ...] = (60_000, 80_000)
    """Steps after which the rate falls to a tenth."""
    warmup: CountOrZero = 1000
    """First steps, in which the rate grows from a thousandth."""
    evaluate_every: CountOrZero = 0
    """Epochs between evaluations; 0: only at the end. The end always has one."""

    @model_validator(mode="after")
    def _sides_fit(self) -> Detect:
        if max(self.size, *self.shorts, 0) > self.longest:
            raise ValueError(f"detect.longest {self.longest} is below detect.size or detect.shorts; raise it")
        return self
