"""What is trained: the losses with their networks, and the optimisers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .sections import Count, CountOrZero, NotNegative, Positive, Section, Share, ShareBelowOne


class _MethodBase(Section):
    hidden_dim: CountOrZero | None = None
    """Width of the projector's hidden layers; absent: the feature width; 0: a linear projector."""
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
    """Batch norm after both layers of the projector, the last without a shift, as in the authors' code; false
    with hidden_dim 512 is ContrastiveCrop's head."""


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
    """Compute batch norm in this many groups, as if on so many GPUs (the authors' CIFAR demo: 8); 0: off."""


class BYOL(_MethodBase):
    """BYOL, arXiv 2006.07733."""

    name: Literal["byol"] = "byol"
    hidden_dim: Count = 4096
    """Width of the hidden layer of projector and predictor."""
    output_dim: Count = 256
    """Width of the embedding in which the loss compares."""
    momentum: Share = 0.99
    """Share of the target network kept at the first step: 0.99 for up to 300 epochs, 0.996 for 1000."""
    final_momentum: Share = 1.0
    """The same at the last step; between them half a cosine. ContrastiveCrop's BYOL has 0.996 for both."""


class SimSiam(_MethodBase):
    """SimSiam, arXiv 2011.10566."""

    name: Literal["simsiam"] = "simsiam"
    hidden_dim: Count | None = None
    """Width of the projector's hidden layers; absent: `output_dim`, as published."""
    output_dim: Count = 2048
    """Width of projector output and predictor output, in which the loss compares."""
    predictor_dim: Count = 512
    """Width of the predictor's hidden layer, a quarter of the output."""


class DINO(_MethodBase):
    """DINO, arXiv 2104.14294."""

    name: Literal["dino"] = "dino"
    hidden_dim: Count = 2048
    """Width of the two hidden layers of the head."""
    bottleneck_dim: Count = 256
    """Width of the unit vector in front of the prototypes."""
    output_dim: Count = 65536
    """Number of prototypes."""
    bn: bool = False
    """Batch norm in the head."""
    student_temperature: Positive = 0.1
    """Logits of the student are divided by this."""
    teacher_temperature: Positive = 0.04
    """The same for the teacher, after the warm-up."""
    warmup_teacher_temperature: Positive = 0.04
    """The same for the teacher in the first epoch."""
    warmup_teacher_epochs: CountOrZero = 0
    """Epochs over which the teacher's temperature goes linearly from the first to the second."""
    centre_momentum: Share = 0.9
    """Share of the centre kept at each step; 1 leaves it at 0, which is no centring."""
    momentum: Share = 0.996
    """Share of the teacher kept at the first step; the authors advise 0.9995 for batches of 256."""
    final_momentum: Share = 1.0
    """The same at the last step; between them half a cosine."""
    freeze_last_layer: NotNegative = 1.0
    """Epochs in which the prototypes do not learn."""


class SCFS(DINO):
    """Semantics-consistent feature search on DINO, arXiv 2212.06486; the defaults are its own DINO's."""

    name: Literal["scfs"] = "scfs"  # type: ignore[assignment]
    teacher_temperature: Positive = 0.07
    """The teacher's logits are divided by this, after the warm-up."""
    warmup_teacher_epochs: CountOrZero = 50
    """Epochs over which the teacher's temperature goes linearly from the first to the second."""
    losses: tuple[Literal["final", "global", "search"], ...] = ("final", "global", "search")
    """Which losses are added, for an ablation: DINO's own, and in every layer that of the global views (half
    of a layer's loss) and that of the search (the other half)."""
    layers: tuple[str, ...] | None = None
    """Dotted names of the searched layers; absent: the last three stages (layer2, layer3, layer4)."""
    layer_bottleneck: Count = 256
    """Channels inside the residual bottleneck of a layer's head."""
    layer_hidden: Count = 2048
    """Width of the hidden layer of a layer's head."""
    layer_output: Count = 256
    """Width of the unit vector that comes out of a layer's head."""


class LeJEPA(_MethodBase):
    """LeJEPA, arXiv 2511.08544; the defaults are those of the authors' minimal example."""

    name: Literal["lejepa"] = "lejepa"
    hidden_dim: Count = 2048
    """Width of the projector's two hidden layers."""
    output_dim: Count = 16
    """Width of the embedding, which is to be normally distributed."""
    weight: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Share of the regulariser in the loss (lambda)."""
    directions: Count = 256
    """Random directions along which the distribution is tested at every step."""


class Own(Section):
    """A method of one's own, whose class is given to `trainers.pretrain.pretrain`: a file loads no code."""

    name: Literal["own"] = "own"
    options: dict[str, Any] = Field(default_factory=dict)
    """What that class reads, by names of its own: numbers and words, such as {weight: 25}."""


Method = Annotated[SimCLR | MoCo | BYOL | SimSiam | DINO | SCFS | LeJEPA | Own, Field(discriminator="name")]


class _OptimBase(Section):
    batch: Count = 256
    """Images per step over all processes."""
    accumulate: Count = 1
    """Parts into which a step's images are cut, one forward and backward pass each; gradients are averaged
    before the step. A part takes the memory of its images only. Batch norm, negatives of the same batch
    (SimCLR) and the mean to which a guide scales its weights are those of a part."""
    lr_scaling: bool = True
    """Multiply `lr` by batch / 256."""
    warmup_epochs: NotNegative = 0.0
    """Epochs of linear growth of the learning rate from 0 to its peak."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of the cosine, whatever the batch."""
    backbone_lr_factor: Annotated[float, Field(gt=0, le=100)] = 1.0
    """The encoder's learning rate as a multiple of the heads', for encoders with given weights."""
    decay_norms: bool = False
    """Decay also biases and 1-D weights, as the code of MoCo, SimSiam and ContrastiveCrop does."""
    clip: Positive | None = None
    """Greatest length of each parameter's gradient, longer ones are shortened to it (DINO: 3)."""
    final_weight_decay: NotNegative | None = None
    """Weight decay at the end, reached by half a cosine (DINO for ViTs: 0.4); absent: constant."""
    lr: Positive = 0.03
    """Peak learning rate, per 256 images if `lr_scaling`."""
    weight_decay: NotNegative = 1e-4
    """Added to the gradient, times the weight."""

    @property
    def peak_lr(self) -> float:
        """Learning rate at the top of the schedule, after scaling."""
        return self.lr * self.batch / 256 if self.lr_scaling else self.lr

    @model_validator(mode="after")
    def _peak_is_a_number_of_networks(self) -> _OptimBase:
        if self.peak_lr > 3e38:  # near the largest of float32
            raise ValueError(f"the peak learning rate {self.peak_lr:.3g} is not a float32; lower optim.lr")
        return self


class SGD(_OptimBase):
    """Stochastic gradient descent with momentum; the defaults are MoCo v2's."""

    name: Literal["sgd"] = "sgd"
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


Optim = Annotated[SGD | LARS | AdamW, Field(discriminator="name")]
