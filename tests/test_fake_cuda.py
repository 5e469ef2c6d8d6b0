"""A training step on a GPU, without one: where tensors are, their types and formats, and that no host waits.

Steps are those of `trainers.pretrain`, on fake CUDA tensors. Backward passes are watched on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from fake_cuda import CPU, CUDA, Watch, fake_gpu
from test_guides import METHODS, PAIRS
from torch import Tensor, nn
from trainees import ENCODERS, LOCAL, Case, Trainee, few_scenes, make_case  # noqa: F401, fixtures

from dali_views import RegionTable
from dali_views.maps import boxes_from_maps, heatmap
from dali_views.maps.align import Offset
from dali_views.maps.coordinates import map_to_image
from dali_views.maps.heatmap import activation_map, align_maps, gradient_map
from dali_views.maps.loss_weights import crop_saliency, pair_weights
from dali_views.regions.queue import UpdateQueue
from trainers.evaluate.learners import Learner, Recipe
from trainers.guides import encoder_maps, reading
from trainers.guides.kept_maps import KeptMaps
from trainers.guides.online_crop import OnlineCrop


def looked(trainee: Trainee) -> None:
    """Put a guide into the state after its first pass: saliency weighs losses, maps of views are aligned."""
    boxes = getattr(trainee.guide, "boxes", trainee.guide)
    boxes = getattr(boxes, "guide", boxes)
    boxes.passes = 1
    if isinstance(boxes, OnlineCrop):
        boxes._measure()


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("encoder", ENCODERS)
# Each method with one guide and each guide with one method: a guide does not see the method's inside.
@pytest.mark.parametrize(("guide", "method"), [pair for pair in PAIRS if not pair.marks])
def test_a_step_stays_on_the_device_and_never_waits_for_it(
    guide: str, method: str, encoder: str, world: int, case: Callable[..., Case]
) -> None:
    with case(guide, method, encoder).on(CUDA, world=world) as trainee:
        looked(trainee)
        trainee.step_on_fakes()


# In float16, LARS looks on the host whether gradients have overflowed.
@pytest.mark.parametrize(
    ("optimizer", "amp"), [("lars", "bf16"), ("adamw", "bf16"), ("adamw", "fp16"), ("sgd", "fp16")]
)
def test_a_step_of_other_optimisers_and_precisions_never_waits_for_the_device(
    optimizer: str, amp: str, case: Callable[..., Case]
) -> None:
    with case().on(CUDA, f"optim.name={optimizer}", f"run.amp={amp}") as trainee:
        trainee.step_on_fakes()


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("method", METHODS)
def test_backward_passes_wait_for_nothing(
    method: str, encoder: str, world: int, case: Callable[..., Case]
) -> None:
    with case(method=method, encoder=encoder).on(CPU, world=world) as trainee:
        check_backward(trainee)


def check_backward(trainee: Trainee) -> None:
    losses, weights = trainee.losses()
    loss = (losses * weights).mean()
    with Watch(CPU):
        loss.backward()


class Table(RegionTable):
    """A region table of small boxes, which says nothing about whole images and is equal on all ranks."""

    def __init__(self, length: int, regions: int) -> None:
        super().__init__(length, regions)
        self.update(range(length), np.tile(np.array([0.2, 0.2, 0.6, 0.6], np.float32), (length, 1)))

    def sync(self) -> int:
        return 0


def sent_by(trainee: Trainee) -> list[dict[str, Tensor]]:
    """What the guide's first pass over two batches sends to the host, under watch.

    What the host does with what has arrived is left out, and so are the waits at the end of a pass.
    """
    sent: list[dict[str, Tensor]] = []

    def send(parts: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        for part in parts:
            UpdateQueue().add(part, 0)
            sent.append(part)
        return []

    with pytest.MonkeyPatch.context() as patch, Watch(trainee.setting.device):
        patch.setattr(encoder_maps, "plain_loader", lambda *_: [trainee.batch] * 2)
        patch.setattr(reading, "_one_behind", send)
        patch.setattr(KeptMaps, "sync", lambda _: None)
        patch.setattr(reading, "warn_if_useless", lambda *_: None)  # reads boxes once, after the pass
        trainee.guide.begin(Table(len(trainee.guide.training.index), trainee.config.regions))
    return sent


def check_pass(trainee: Trainee) -> None:
    """A pass of the guide computes in float32 and on the device what it sends."""
    sent = sent_by(trainee)
    assert sent
    for one in (one for part in sent for one in part.values()):
        assert one.device == trainee.setting.device
        assert one.dtype in (torch.float32, torch.int64)


# With the readings that compute on the device, and those that need the host.
PASSES: dict[str, list[str]] = {
    "contrastive_crop": ["reading=extent"],
    "averaged": ["reading=rectangle"],
    "principal": [],
    "frozen_boxes": ["map=principal", "aligned=false"],
    "saliency": ["map=activation"],
    "online, first": ["reading=extent"],
}


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("guide", PASSES)
def test_a_pass_of_a_guide_waits_for_no_batch_and_its_maps_are_float32(
    guide: str, encoder: str, case: Callable[..., Case]
) -> None:
    changes = PASSES[guide] + ["warmup=0"] * (guide != "frozen_boxes")
    with case(guide, encoder=encoder).on(CUDA, *(f"guide.{change}" for change in changes)) as trainee:
        check_pass(trainee)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_maps_wait_for_no_batch_and_are_float32(method: str, case: Callable[..., Case]) -> None:
    with case(method=method).on(
        CPU, "guide.map=gradient", "guide.warmup=0", "guide.rate=1", "guide.aligned=false"
    ) as trainee:
        check_pass(trainee)


def check_probe(trainee: Trainee) -> None:
    """Batches of kept features stay on the device."""
    images, recipe = trainee.guide.training.index, Recipe(epochs=1, batch=16, head_lr=1.0, augment=False)
    encoder, head = trainee.method.encoder, nn.Linear(trainee.method.encoder.dim, 3, device=CUDA)
    learner = Learner(trainee.setting, trainee.config.views, encoder, head, images, images, recipe)
    labels = torch.zeros(len(images), dtype=torch.int64, device=CUDA)
    vars(learner)["_training_features"] = torch.rand(len(images), encoder.dim, device=CUDA), labels
    with Watch(CUDA):
        batches = list(learner.batches(0))
    assert {(len(rows), rows.device, names.device) for rows, names in batches} == {(16, CUDA, CUDA)}


def test_a_probe_on_kept_features_waits_for_no_batch(case: Callable[..., Case]) -> None:
    with case().on(CUDA) as trainee:
        check_probe(trainee)


READ: dict[str, Callable[..., Tensor]] = {
    "activation": lambda features, _: activation_map(features),
    "principal": lambda features, _: heatmap.principal_map(features),
    "gradient": lambda features, _: gradient_map(features, features),
    "aligned": lambda features, _: align_maps(features[:, 0], Offset(0.4, -0.3)),
    "threshold": lambda features, _: boxes_from_maps(features[:, 0], 0.5, (64, 64)),
    "auto": lambda features, _: boxes_from_maps(features[:, 0], "auto", (64, 64)),
    "otsu": lambda features, _: boxes_from_maps(features[:, 0], "otsu", (64, 64)),
    "rectangle": lambda features, _: boxes_from_maps(features[:, 0], "auto", (64, 64), "rectangle"),
    "in crops": lambda features, crops: crop_saliency(features[:, 0], crops, crops[:, 0] > 0),
    "on images": lambda features, crops: map_to_image(features[:, 0], crops, crops[:, 0] > 0, (16, 16))[0],
    "weights": lambda _, crops: pair_weights(crops, 0.5),
}


@pytest.mark.parametrize("read", READ)
def test_what_is_read_off_features_is_float32_under_autocast_and_never_waits(read: str) -> None:
    check_reading(read)


def check_reading(read: str) -> None:
    with fake_gpu(), torch.autocast("cuda", torch.bfloat16):
        features, crops = torch.rand(LOCAL, 16, 8, 8, device=CUDA), torch.rand(LOCAL, 4, device=CUDA)
        with Watch(CUDA) as watch:
            result = READ[read](features, crops)
    assert (result.dtype, result.device) == (torch.float32, CUDA)
    assert watch.halves == []


def _filled(values: Tensor) -> None:
    values[values > 0] = 0.0


NOTICED: dict[str, Callable[[Tensor], object]] = {
    "item": lambda values: values.sum().item(),
    "if": lambda values: 1 if values.any() else 0,
    "list": lambda values: values.tolist(),
    "mask": lambda values: values[values > 0],
    "rows of a mask": lambda values: (values > 0).nonzero(),
    "equal": lambda values: torch.equal(values, values),
    "cpu": lambda values: values.cpu(),
    "numbers": lambda values: values.new_tensor([1, 2]),
    "pageable": lambda values: torch.zeros(3).to(CUDA, non_blocking=True),
    "blocking": lambda values: torch.zeros(3).pin_memory().to(CUDA),
    "rows of the CPU": lambda values: values[torch.zeros(2, dtype=torch.long)],
}
PASSED: dict[str, Callable[[Tensor], object]] = {
    "pinned": lambda values: torch.zeros(3).pin_memory().to(CUDA, non_blocking=True),
    "to the CPU": lambda values: values.to(CPU, non_blocking=True),
    "filled by a mask": _filled,
    "a number in several places": lambda values: values.__setitem__(slice(2), 1.0),
    "number": lambda values: torch.where(values > 0, values * 2, 1.0),
}


@pytest.mark.parametrize("wait", [*NOTICED, *PASSED])
def test_a_watch_notices_what_waits(wait: str) -> None:
    with fake_gpu():
        values = torch.rand(3, device=CUDA)
        with Watch(CUDA):
            if wait in PASSED:
                PASSED[wait](values)
                return
            with pytest.raises(AssertionError, match="waits for the device"):
                NOTICED[wait](values)
