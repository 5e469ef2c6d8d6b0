"""The two sides of a set with true boxes: images to train on and images to test on."""

from __future__ import annotations

import numpy as np

from .. import config as cfg
from ..data import open_images
from .truth import Truth, read_truth

_STREAM = 0xDE7EC7  # sets the draw of held-out images apart from others of the seed


def open_sets(config: cfg.Config, seed: int) -> tuple[Truth, Truth]:
    """The images to train on, which have objects, and those to test on; all ranks get the same."""
    train, tests = open_truths(config, seed)
    remedy = "check detect.val_instances" if config.detect.val_instances else "raise data.val_share"
    return train.with_objects(), _tested(tests, remedy)


def open_truths(config: cfg.Config, seed: int) -> tuple[Truth, Truth]:
    """All images of both sides, with objects or without."""
    data, section = config.data, config.detect
    if data.kind in ("cifar10", "cifar100", "stl10"):
        raise ValueError(f"data.kind {data.kind} has no boxes; name images with boxes by data.path")
    files = section.instances or ((data.instances,) if data.instances else ())
    if not files:
        raise ValueError("this needs true boxes; name their file by data.instances or detect.instances")
    whole = read_truth(open_images(data), files)
    if not section.val_instances:
        if section.val_path is not None:
            raise ValueError("detect.val_path has no true boxes; name their file by detect.val_instances")
        order = np.random.default_rng([seed, _STREAM]).permutation(len(whole.objects))
        held = np.sort(order[: max(1, round(data.val_share * len(order)))])
        rest = np.setdiff1d(np.arange(len(order)), held)
        if not len(rest):
            raise ValueError("one image cannot serve for training and for the test; name more by data.path")
        return whole.subset(rest), whole.subset(held)
    instances = section.val_instances[0] if data.kind == "coco" else None
    changes = {"path": section.val_path or data.path, "instances": instances}
    tests = read_truth(open_images(data.model_copy(update=changes)), section.val_instances, whole.classes)
    return whole, tests


def _tested(tests: Truth, remedy: str) -> Truth:
    if all(each.ignored.all() for each in tests.objects):
        raise ValueError(f"none of {len(tests.objects)} test images has a box to find; {remedy}")
    return tests
