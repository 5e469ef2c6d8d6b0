"""torchvision's Faster and Mask R-CNN on our encoders, with images that the loader has made ready."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d

from .. import config as cfg
from ..encoders.backbones import Backbone
from ..engine import ranks
from ..engine.setting import Setting
from ..methods.networks import joined_batch_norm, synced_batch_norm

__all__ = ["Detector"]

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_CELLS = 7  # height and width of what the box head sees of a proposal
_LOOK = 256  # pixels of the image that the network is laid out with: 8 cells of the coarsest stage


class Detector(nn.Module):
    """An encoder with pyramid and heads.

    In training it gives the loss of images and targets, as `targets_of` makes them; otherwise detections:
    boxes (m, 4) in pixels of the view, labels (m,), scores (m,) in falling order, and masks (m, 1, 28, 28)
    within the boxes. Boxes and scores are float32.

    Raises:
        ValueError: the encoder has no stages.
    """

    def __init__(
        self, encoder: Backbone, classes: int, section: cfg.Detect, masks: bool, setting: Setting
    ) -> None:
        super().__init__()
        if not all(hasattr(encoder, stage) for stage in _STAGES):
            raise ValueError(
                f"{type(encoder).__name__} has no stages of falling resolution (layer1 to layer4) to build a "
                "pyramid on; detection needs a ResNet"
            )
        self.setting = setting
        joined_batch_norm(encoder)
        encoder.requires_grad_(True)  # a momentum encoder had it off
        if section.norm == "frozen":
            _freeze_norms(encoder)
        for name in ("conv1", "bn1", *_STAGES[: section.frozen_stages]) if section.frozen_stages else ():
            encoder.get_submodule(name).requires_grad_(False)
            _freeze_norms(encoder, name)
        stages = {stage: str(level) for level, stage in enumerate(_STAGES)}
        norm = None if section.norm == "frozen" else nn.BatchNorm2d
        width, deep = section.width, 4 * section.width
        body = BackboneWithFPN(encoder, stages, _widths(encoder), width, norm_layer=norm)
        sides = tuple((side,) for side in section.anchors)
        # Heads as torchvision and detectron2 have them, where a width of 256 is the default.
        options: dict[str, Any] = {
            "rpn_anchor_generator": _Anchors(sides, ((0.5, 1.0, 2.0),) * len(sides)),
            "rpn_post_nms_top_n_train": section.proposals, "rpn_post_nms_top_n_test": section.proposals,
            "box_batch_size_per_image": section.rois, "box_head": TwoMLPHead(width * _CELLS**2, deep),
            "box_predictor": FastRCNNPredictor(deep, classes + 1),
        }  # fmt: skip
        if masks:
            options["mask_head"] = MaskRCNNHeads(width, (width,) * 4, 1)
            options["mask_predictor"] = MaskRCNNPredictor(width, width, classes + 1)
        self.network: Any = (MaskRCNN if masks else FasterRCNN)(body, **options)
        self.network.transform = _Ready()
        for head in (self.network.rpn.head, self.network.roi_heads.box_predictor):
            head.register_forward_hook(_in_full)
        # The poolers note the stages' scales when they first see an image; these should not depend on which.
        self.network.eval()
        with torch.no_grad():
            self.network([torch.zeros(3, _LOOK, _LOOK)])
        if section.norm == "sync" and ranks.world() > 1 and setting.device.type == "cuda":
            self.network = synced_batch_norm(self.network)
        self.to(setting.device).to(memory_format=torch.channels_last).train()

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """The sum of the losses, a scalar, in training; else one dictionary of detections per image."""
        with self.setting.autocast():
            found = self.network(images, targets)
        return sum(loss.float() for loss in found.values()) if self.training else found


class _Anchors(AnchorGenerator):  # type: ignore[misc]
    """In full precision, whatever the network computes in: bfloat16 rounds 1,000 pixels by 4."""

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> Any:
        return super().forward(image_list, [each[:, :1].float() for each in feature_maps])


def _in_full(_: nn.Module, __: Any, out: Any) -> tuple[Any, ...]:
    """A head's scores and changes of boxes, also in lists by stage; boxes would take over their precision."""
    return tuple([one.float() for one in part] if isinstance(part, list) else part.float() for part in out)


class _Ready(GeneralizedRCNNTransform):  # type: ignore[misc]  # torchvision has no types
    """In place of torchvision's: images are normalised and resized already, and results stay in the view."""

    def __init__(self) -> None:
        super().__init__(1, 1, [], [])

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        return result


def _freeze_norms(module: nn.Module, within: str = "") -> None:
    """Replace batch norms, of the submodule `within` or of all, by ones with fixed statistics and weights."""
    for name, norm in list(module.named_modules()):
        if isinstance(norm, nn.BatchNorm2d) and (not within or f"{name}.".startswith(f"{within}.")):
            fixed = FrozenBatchNorm2d(norm.num_features, norm.eps)
            fixed.load_state_dict(norm.state_dict())
            module.set_submodule(name, fixed)


@torch.no_grad()
def _widths(encoder: Backbone) -> list[int]:
    """Channels of the four stages."""
    found: list[int] = []
    hooks = [
        encoder.get_submodule(stage).register_forward_hook(lambda _, __, out: found.append(out.shape[1]))
        for stage in _STAGES
    ]
    training, device = encoder.training, next(encoder.parameters()).device
    encoder.eval()(torch.zeros(1, 3, 64, 64, device=device))
    encoder.train(training)
    for hook in hooks:
        hook.remove()
    return found
