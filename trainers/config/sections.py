"""The sections that every run has: run, data, views, model, and how to evaluate."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

Count: TypeAlias = Annotated[int, Field(ge=1)]
CountOrZero: TypeAlias = Annotated[int, Field(ge=0)]
# float32, in which networks compute, ends at 3.4e38.
Positive: TypeAlias = Annotated[float, Field(gt=0, le=1e38, allow_inf_nan=False)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0, le=1e38, allow_inf_nan=False)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Dilation: TypeAlias = Annotated[float, Field(ge=1, allow_inf_nan=False)]
CropKind: TypeAlias = Literal["random", "contrastive", "inside", "whole", "centre"]
ShareBelowOne: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
MapKind: TypeAlias = Literal["activation", "principal", "gradient"]

_ONE_KIND = {"instances": "coco", "classes": "folder", "root": "list", "image": "table", "label": "table"}
_NOT_OF_ARCHIVES = ("leave_out", "boxes", "eval_train", "eval_val", "val_share", "cache_dir")


class Section(BaseModel):
    """Rules of all sections: no unknown keys, no silent conversion, no change after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _no_text_with_nul(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:  # no path can hold one
            raise PydanticCustomError("nul", "should hold no NUL character")
        return value


def _gpu(device: Any) -> Any:
    """PyTorch's word for a GPU is taken, too."""
    return "gpu" if device == "cuda" else device


class Run(Section):
    """Where, how long and on what the run goes."""

    out: Annotated[str, Field(min_length=1)]
    """Folder for checkpoints, logs and the resolved configuration."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights and of every view."""
    epochs: Count = 100
    """Passes over the data set."""
    max_steps: Count | None = None
    """Stop after this many optimiser steps, even if epochs remain; the schedules still span `epochs`."""
    device: Annotated[Literal["auto", "gpu", "cpu"], BeforeValidator(_gpu)] = "auto"
    """Where images are decoded and the model trains; auto: gpu if there is one. cuda is gpu."""
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"
    """Mixed precision; auto: bf16 on a GPU that has it (compute capability 8), else fp16, off on the CPU."""
    compile: bool = False
    """Run the network through torch.compile (minutes at the start, faster steps afterwards)."""
    checkpoint_every: CountOrZero = 0
    """Steps between checkpoints within an epoch; 0: only at the end of each, which always has one."""
    log_every: Count = 20
    """Steps between lines of the log."""
    evaluate_every: CountOrZero = 10
    """Epochs between evaluations, the last epoch included; 0: never."""
    online_probe: bool = False
    """Train a linear classifier beside the encoder, without a pass over the data, from the features of the
    first views. Its top-1 on them is `online_top1`, on the images that kNN classifies `online_test_top1`."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads per process that decode and augment; absent: this process's share of the cores."""
    hw_decoder_load: Share = 1.0
    """Share of a batch's JPEGs for the GPU's hardware decoder; CUDA decodes the others. Between 0 and 1 the
    pixels of a sample depend a little on its place in the batch."""
    on_bad_image: Literal["skip", "raise"] = "skip"
    """skip: an unreadable image is named, listed in quarantine.txt and replaced; raise: it ends the run."""
    max_bad_share: Share = 0.1
    """A larger share of unreadable images ends the run with their list."""
    wandb: str | None = None
    """Project in Weights & Biases that gets the curves and pictures, too; needs the package wandb."""


class Data(Section):
    """Which images there are."""

    kind: Literal["folder", "list", "coco", "shards", "table", "lmdb", "cifar10", "cifar100", "stl10"]
    """folder: one subfolder per class (or none); list: text file of paths; coco: folder with `instances`;
    shards: WebDataset's tar shards; table: Parquet or Arrow files; lmdb: encoded images; cifar10, cifar100,
    stl10: torchvision's archives (STL-10: train and unlabelled images)."""
    path: str
    """Image folder, list file, shards (one, a glob, braces as in "train-{000000..000146}.tar", a text file of
    them), each also as a URL ("s3://bucket/train", "gs://..."); tables (as shards, or a folder of them), LMDB
    environment or the folder of an archive."""
    classes: str | None = None
    """Text file that names the class folders to use, one a line (ImageNet-100); only for kind folder."""
    instances: str | None = None
    """COCO instances JSON with true boxes; only for kind coco."""
    boxes: str | None = None
    """Text file with true boxes, a line `name x0 y0 x1 y1` each, or a folder of YOLO's label files; used to
    score localisation, never to train; not for CIFAR and STL-10."""
    root: str | None = None
    """Folder that the paths of a list start from; absent: that of the list. Only for kind list."""
    image: str | None = None
    """Column of a table with the encoded images; absent: the only one that fits. Only for kind table."""
    label: str | None = None
    """Column of a table with the labels; absent: `label` or the like, if it has one. Only for kind table."""
    leave_out: str | None = None
    """List of files to leave out, as `dali-views check` and a run (quarantine.txt) write it."""
    cache_dir: str | None = None
    """Folder on a local disk where images of a store or of shards are kept once they are read."""
    cache_gb: Positive = 100.0
    """Gigabytes that all data sets and processes of this machine may take there."""
    eval_train: str | None = None
    """Labelled folder whose features are the kNN bank; absent: the training images."""
    eval_val: str | None = None
    """Labelled folder to classify; absent: the share `val_share` of the labelled set."""
    val_share: ShareBelowOne = 0.1
    """Share of the labelled set held out (deterministically) to classify when `eval_val` is absent."""

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Data:
        for key, kind in _ONE_KIND.items():
            if getattr(self, key) is not None and self.kind != kind:
                raise ValueError(
                    f"data.{key} is only read for data.kind {kind}, not {self.kind}; set it to null"
                )
        for key in _NOT_OF_ARCHIVES:
            default = type(self).model_fields[key].default
            if self.kind in ("cifar10", "cifar100", "stl10") and getattr(self, key) != default:
                raise ValueError(
                    f"data.{key} is not read for data.kind {self.kind}, which has fixed parts and "
                    f"neither files nor boxes; set it to {'null' if default is None else default}"
                )
        return self


class Views(Section):
    """What a view is: a named recipe and the few knobs that are varied."""

    name: str = "moco_v2"
    """Recipe in dali_views.plan.recipes: simclr, moco_v2, ..."""
    size: Count = 224
    """Height and width of a view in pixels."""
    crop: CropKind = "random"
    """How a crop is placed: random ignores boxes; contrastive and inside follow the region table."""
    second_crop: CropKind | None = None
    """How the crop of the second view is placed; absent: as `crop`."""
    dilate: tuple[Dilation, Dilation] | None = None
    """Factors by which the box is enlarged for the first and for the second view, in height and width;
    absent: [1, 1]. [1, 1.5] shows the object in one view, the object and its surroundings in the other."""
    joint: Annotated[float, Field(ge=-10, le=10)] | None = None
    """Beta of JointCrop, which draws the areas of the first two views together: 0, as published, makes all
    ratios equally likely (in the logarithm), below 0 prefers unequal areas; absent: independent areas."""
    alpha: Positive = 0.6
    """Beta(alpha, alpha) of ContrastiveCrop's centres: below 1 prefers the box's border; 1 is uniform."""
    scale: tuple[float, float] | None = None
    """Least and greatest crop area as shares of the image; absent: the recipe's own."""
    blur: Share | None = None
    """Probability of blur of every view (0 for small images); absent: the recipe's own."""
    vflip: Share | None = None
    """Probability of a vertical flip of every view, for images without a preferred orientation; absent: 0."""
    rotate90: Share | None = None
    """Probability that a view is rotated by 90, 180 or 270 degrees, each as likely; absent: 0."""
    partner: Literal["none", "replace", "add"] = "none"
    """Use of the image's semantic partner (guide semantic_pairs): replace: the second view is cut from
    it; add: one view more is, and the loss of that one with the first view is added to that of the others."""
    locals: CountOrZero | None = None
    """Local views after the two global ones, in the recipe dino; absent: 8."""
    local_size: Count | None = None
    """Height and width of the local views in pixels; absent: 96."""
    local_crop: CropKind | None = None
    """How the crops of the local views are placed; absent: as `crop`."""
    local_scale: tuple[float, float] | None = None
    """Least and greatest crop area of the local views; absent: the recipe's own."""
    mean: tuple[Share, Share, Share] = (0.485, 0.456, 0.406)
    """Mean of RGB in [0, 1] that is subtracted from every view."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Deviation of RGB in [0, 1] that every view is divided by."""

    @property
    def guided(self) -> list[str]:
        """The kinds of crop among the views that follow boxes."""
        kinds = dict.fromkeys([self.crop, self.second_crop, self.local_crop])
        return [kind for kind in kinds if kind in ("contrastive", "inside")]

    @model_validator(mode="after")
    def _scales_are_ranges(self) -> Views:
        for key in ("scale", "local_scale"):
            scale = getattr(self, key)
            if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
                raise ValueError(f"views.{key} should be two shares 0 < low <= high <= 1, not {list(scale)}")
        return self


class Model(Section):
    """The encoder."""

    backbone: str = "resnet50"
    """A torchvision name, or a timm name if timm is installed. Its feature width is detected."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """small: 3x3 stride-1 first convolution without max-pool, for images up to 64 pixels (ResNets only)."""
    zero_init_residual: bool = False
    """Start the last batch norm of every residual block at 0, as SimSiam does (ResNets only)."""
    weights: str | None = None
    """Start of the encoder and the momentum encoder: a run folder, a file (a checkpoint,
    .safetensors or torch.save) or timm:NAME[:FILE], torchvision:NAME[:FILE]; absent: random weights. Heads
    start at random."""
    frozen_stages: CountOrZero = 0
    """First stages that do not learn, with all before them (stem, patch and position embedding), batch norm's
    statistics included: 1 is stem and layer1 of a ResNet, stem and first stage of a ConvNeXt, everything to
    the first block of a ViT."""


class Maps(Section):
    """Where maps come from, whoever uses them."""

    layer: str | None = None
    """Dotted name of the module whose output is the map; absent: the backbone's last spatial one."""
    size: Count | None = None
    """Side in pixels of the square to which the whole image is resized; absent: the size of the views."""
    aligned: bool = True
    """Align maps with the image; false: as the layer has them, as published (in ResNets, half a cell off)."""


class Localise(Maps):
    """How evaluations find the object in the encoder's maps, whatever guides the crops."""

    map: Literal["activation", "principal"] = "activation"
    """activation: how strongly each position responds (arXiv 2202.03278); principal: the first principal
    component of an image's positions (ours)."""


class Knn(Section):
    """Nearest-neighbour classification with the frozen features, during training and by `knn`."""

    k: Count | None = None
    """Neighbours that vote; absent, as below: as published, 20 for DINO and SCFS, else 200."""
    temperature: Positive | None = None
    """A neighbour's vote is exp(cosine / temperature); absent: 0.07 for DINO and SCFS, else 0.1, which is
    MoCo's demo for CIFAR-10."""


class _Training(Section):
    epochs: Count | None = None
    """Passes over the labelled images; absent, as the keys below: as published."""
    batch: Count | None = None
    """Images per step over all processes."""
    lr: Positive | None = None
    """Peak learning rate per 256 images (the encoder's, if it is trained), multiplied by batch / 256."""
    weight_decay: NotNegative | None = None
    """Decay rate of the weights."""


class Probe(_Training):
    """A linear classifier on the frozen encoder."""

    recipe: Literal["auto", "published", "moco", "simclr", "byol", "simsiam", "dino", "small"] = "auto"
    """auto: standardised features and a rate that suits all encoders (ours); published: the recipe of the
    method's authors, `small` (ContrastiveCrop's) for views up to 96 pixels; or the one of that name."""
    augment: bool | None = None
    """Random crops and flips at every epoch, as all published recipes have it; false: features of the central
    view, made once, as in the recipe auto; absent: as the recipe says."""


class FineTune(_Training):
    """Encoder and classifier trained together on a share of the labels."""

    recipe: Literal["auto", "simclr", "byol", "other"] = "auto"
    """The published recipe to follow; auto: that of the method, else `other`, which is ORL's and SwAV's."""
    labels: float | str = 0.01
    """Share of every class's images that keep their label, or a text file of image names, one a line."""
    head_lr: Positive | None = None
    """Peak learning rate of the classifier per 256 images."""

    @model_validator(mode="after")
    def _labels_are_a_share_or_a_file(self) -> FineTune:
        if not isinstance(self.labels, str) and not 0 < self.labels <= 1:
            raise ValueError(f"finetune.labels should be a share in (0, 1] or a file, not {self.labels}")
        return self
