"""The typed configuration tree of a training run; `config_file` reads it from YAML and writes it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "LARS",
    "SGD",
    "AdamW",
    "Config",
    "ContrastiveCrop",
    "Data",
    "Guide",
    "Method",
    "MoCo",
    "Model",
    "NoGuide",
    "Optim",
    "Run",
    "SimCCrop",
    "SimCLR",
    "Views",
]


class Section(BaseModel):
    """Common rules: no unknown keys, no silent conversion, no change after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]


class Run(Section):
    """Where, how long and on what the run goes."""

    out: str
    """Folder for checkpoints, logs and the resolved configuration."""
    seed: CountOrZero = 0
    """Seed of initial weights and of every view."""
    epochs: Count = 100
    """Passes over the data set."""
    max_steps: Count | None = None
    """Stop after this many optimiser steps although epochs remain; the schedules still span `epochs`."""
    device: Literal["auto", "gpu", "cpu"] = "auto"
    """Where images are decoded and the model trains; auto: gpu if there is one."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto: bf16 on a GPU that has it, else fp16, off on the CPU."""
    compile: bool = False
    """Run the network through torch.compile (minutes at the start, faster steps afterwards)."""
    checkpoint_every: CountOrZero = 0
    """Steps between checkpoints within an epoch; 0: only at the end of each, which always has one."""
    log_every: Count = 20
    """Steps between lines of the log."""
    evaluate_every: CountOrZero = 10
    """Epochs between evaluations, the last epoch included; 0: never."""
    threads: Count | None = None
    """CPU threads per process that decode and augment; absent: this process's share of the cores."""


class Data(Section):
    """Which images there are."""

    kind: Literal["folder", "list", "coco", "cifar10", "cifar100"]
    """folder: one subfolder per class (or none); list: text file of paths; coco: image folder with
    `instances`; cifar10, cifar100: torchvision's archives."""
    path: str
    """Image folder, list file or, for CIFAR, the folder that holds (or will hold) the archive."""
    instances: str | None = None
    """COCO instances JSON with true boxes; only for kind coco."""
    boxes: str | None = None
    """Text file with true boxes, used to score localisation, never to train."""
    eval_train: str | None = None
    """Labelled folder whose features are the kNN bank; absent: the training images."""
    eval_val: str | None = None
    """Labelled folder to classify; absent: the share `val_share` of the labelled set."""
    val_share: ShareBelowOne = 0.1
    """Share of the labelled set held out (deterministically) to classify when `eval_val` is absent."""

    @model_validator(mode="after")
    def _instances_fit(self) -> Data:
        if self.instances is not None and self.kind != "coco":
            raise ValueError(f"data.instances is only read for data.kind coco, not {self.kind}; remove it")
        return self


class Views(Section):
    """What a view is: a named recipe and the few knobs that are varied."""

    name: str = "moco_v2"
    """Recipe in dali_views.recipes: simclr, moco_v2, ..."""
    size: Count = 224
    """Height and width of a view in pixels."""
    crop: Literal["random", "contrastive", "inside", "whole", "centre"] = "random"
    """How a crop is placed: random ignores boxes; contrastive and inside follow the region table."""
    alpha: Positive = 0.6
    """Beta(alpha, alpha) of ContrastiveCrop's centres: below 1 prefers the box's border; 1 is uniform."""
    scale: tuple[float, float] | None = None
    """Least and greatest crop area as shares of the image; absent: the recipe's own."""
    blur: Share | None = None
    """Probability of blur where all views share one (0 for small images); absent: the recipe's own."""
    mean: tuple[Share, Share, Share] = (0.485, 0.456, 0.406)
    """Mean of RGB in [0, 1] that is subtracted from every view."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Deviation of RGB in [0, 1] that every view is divided by."""

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> Views:
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"views.scale should be two shares 0 < low <= high <= 1, not {list(self.scale)}")
        return self


class Model(Section):
    """The encoder."""

    backbone: str = "resnet50"
    """A torchvision name, or a timm name if timm is installed. Its feature width is found by itself."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """small: 3x3 stride-1 first convolution without max-pool, for images up to 64 pixels (ResNets only)."""


class _MethodBase(Section):
    hidden_dim: CountOrZero | None = None
    """Width of the projector's hidden layer; absent: the feature width; 0: a linear projector."""
    output_dim: Count = 128
    """Width of the embedding in which the loss compares."""
    loss_scale: Positive = 1.0
    """Factor on the loss. ContrastiveCrop's SimCLR has T / 0.07 = 7.142857 (T = 0.5)."""


class SimCLR(_MethodBase):
    """SimCLR, arXiv 2002.05709."""

    name: Literal["simclr"] = "simclr"
    temperature: Positive = 0.1
    """Cosine similarities are divided by this."""
    bn: bool = True
    """Batch norm after the projector's hidden layer; false with hidden_dim 512 is ContrastiveCrop's head."""


class MoCo(_MethodBase):
    """MoCo v2, arXiv 2003.04297."""

    name: Literal["moco"] = "moco"
    temperature: Positive = 0.2
    """Cosine similarities are divided by this."""
    bn: bool = False
    """Batch norm after the projector's hidden layer."""
    queue: Count = 65536
    """Keys of earlier batches that serve as negatives."""
    momentum: Share = 0.999
    """Share of the key encoder kept at each step."""
    symmetric: bool = False
    """Each view is query and key in turn and the two losses are added (twice the cost per step)."""
    split_bn: CountOrZero = 0
    """Compute batch norm in this many groups per process, as if on so many GPUs; 0: off. Wanted on one
    GPU (8 in the authors' CIFAR demo), where shuffling over processes does nothing. Divides the batch."""


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


class SimCCrop(Section):
    """One fixed centre box for all images from the first epoch on, arXiv 2202.03278."""

    name: Literal["simccrop"] = "simccrop"
    box: tuple[Share, Share, Share, Share] = (0.25, 0.25, 0.75, 0.75)
    """y0, x0, y1, x1 as fractions of the image."""


class _OptimBase(Section):
    batch: Count = 256
    """Images per step over all processes."""
    lr_scaling: bool = True
    """Multiply `lr` and `min_lr` by batch / 256."""
    warmup_epochs: NotNegative = 0.0
    """Epochs of linear growth of the learning rate from 0 to its peak."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of the cosine, in the unit of `lr`."""
    decay_norms: bool = False
    """Decay also biases and 1-D weights, as the code of MoCo, SimSiam and ContrastiveCrop does."""
    lr: Positive
    """Peak learning rate, per 256 images if `lr_scaling`."""
    weight_decay: NotNegative
    """Decay rate of the weights."""

    @property
    def peak_lr(self) -> float:
        """Learning rate at the top of the schedule, after scaling."""
        return self.lr * self.batch / 256 if self.lr_scaling else self.lr

    @property
    def floor_lr(self) -> float:
        """Learning rate at the end of the schedule, after scaling."""
        return self.min_lr * self.batch / 256 if self.lr_scaling else self.min_lr


class SGD(_OptimBase):
    """Stochastic gradient descent with momentum; the defaults are MoCo v2's."""

    name: Literal["sgd"] = "sgd"
    lr: Positive = 0.03
    """Peak learning rate, per 256 images if `lr_scaling`."""
    weight_decay: NotNegative = 1e-4
    """Added to the gradient, times the weight."""
    momentum: ShareBelowOne = 0.9
    """Share of the last step's velocity that is kept."""


class LARS(_OptimBase):
    """Layer-wise adaptive rates, arXiv 1708.03888; the defaults are SimCLR's."""

    name: Literal["lars"] = "lars"
    lr: Positive = 0.3
    """Peak learning rate, per 256 images if `lr_scaling`."""
    weight_decay: NotNegative = 1e-6
    """Added to the gradient, times the weight."""
    momentum: ShareBelowOne = 0.9
    """Share of the last step's velocity that is kept."""
    trust: Positive = 0.001
    """Trust coefficient eta: length of a layer's step relative to the length of its weights, times lr."""


class AdamW(_OptimBase):
    """Adam with decoupled weight decay; the defaults are DINO's for ViTs."""

    name: Literal["adamw"] = "adamw"
    lr: Positive = 5e-4
    """Peak learning rate, per 256 images if `lr_scaling`."""
    weight_decay: NotNegative = 0.04
    """Share of the weight removed per step, times the learning rate."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    """Decay rates of the running first and second moments."""


Method = Annotated[SimCLR | MoCo, Field(discriminator="name")]
Guide = Annotated[NoGuide | ContrastiveCrop | SimCCrop, Field(discriminator="name")]
Optim = Annotated[SGD | LARS | AdamW, Field(discriminator="name")]


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

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        if self.guide.name != "none" and self.views.crop not in ("contrastive", "inside"):
            raise ValueError(
                f"guide.name {self.guide.name} writes boxes that views.crop {self.views.crop} ignores; "
                "set views.crop to contrastive or inside, or guide.name to none"
            )
        if isinstance(self.method, MoCo) and self.method.split_bn and self.optim.batch % self.method.split_bn:
            raise ValueError(
                f"method.split_bn {self.method.split_bn} does not divide optim.batch {self.optim.batch}; "
                "choose a divisor"
            )
        return self
