"""Average precision on cases that are known by hand, and as pycocotools has it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dali_views import SampleIndex
from dali_views.tools.scenes import run_lengths
from trainers.detect.scores import Found, coco_scores, scores, voc_scores
from trainers.detect.truth import Objects, Truth

BOXES = np.array([[10, 10, 30, 30], [40, 40, 60, 60]], np.float64)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    folder = tmp_path_factory.mktemp("two")
    for number in range(2):
        Image.new("RGB", (64, 64)).save(folder / f"{number}.png")
    return SampleIndex.from_folder(folder, cache=False, progress=False)


def truth_of(index: SampleIndex, ignored: tuple[bool, bool] = (False, False), voc: bool = False) -> Truth:
    """Two images with the same two objects, of the classes 1 and 2."""
    masks = [run_lengths(inside(box)) for box in BOXES]
    one = Objects(
        BOXES, np.array([1, 2]), np.full(2, 400.0), np.array(ignored), ~np.array(ignored), list(masks)
    )
    return Truth(index, [one, one], ["a", "b"], voc)


def inside(box: np.ndarray) -> np.ndarray:
    mask = np.zeros((64, 64), np.bool_)
    x0, y0, x1, y1 = box.astype(int)
    mask[y0:y1, x0:x1] = True
    return mask


def found(
    boxes: np.ndarray = BOXES, labels: tuple[int, ...] = (1, 2), rated: tuple[float, ...] = ()
) -> Found:
    from pycocotools import mask

    lengths = [mask.frPyObjects(run_lengths(inside(box)), 64, 64) for box in boxes]
    rates = np.array(rated or [0.9] * len(boxes))
    return Found(boxes.copy(), np.array(labels, np.int64), rates, lengths)


NONE = Found(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), [])


@pytest.mark.parametrize("voc", [False, True])
def test_perfect_and_absent_detections(index, voc):
    truth = truth_of(index, voc=voc)
    kinds = ("box",) if voc else ("box", "mask")
    expected = {f"{kind}_ap{end}": 1.0 for kind in kinds for end in ("", "50", "75")}
    assert scores(truth, {0: found(), 1: found()}) == pytest.approx(expected)
    assert set(scores(truth, {0: NONE, 1: NONE}).values()) == {0.0}
    assert scores(truth, {0: found()}) == pytest.approx(expected), "an image that was not read does not count"


@pytest.mark.parametrize("measure", [lambda t, f: coco_scores(t, f, "bbox"), voc_scores], ids=["coco", "voc"])
def test_shifted_boxes_are_right_up_to_their_iou(index, measure):
    shifted = BOXES + np.array([2, 0, 2, 0])  # IoU 18 * 20 / (2 * 400 - 360) = 0.818: right at 0.5, ..., 0.8
    right = measure(truth_of(index), {0: found(shifted), 1: found(shifted)})
    assert right == pytest.approx({"box_ap": 0.7, "box_ap50": 1.0, "box_ap75": 1.0})


def test_half_of_the_objects_and_a_wrong_one_first(index):
    truth = truth_of(index)
    half = {0: found(), 1: NONE}
    # Recall 0.5 at a precision of 1: 51 of COCO's 101 points of recall, 6 of VOC's 11.
    assert coco_scores(truth, half, "bbox")["box_ap50"] == pytest.approx(51 / 101)
    assert voc_scores(truth, half)["box_ap50"] == pytest.approx(6 / 11)
    lured = {row: found(np.vstack([BOXES, [[0, 0, 5, 5]]]), (1, 2, 1), (0.5, 0.5, 0.9)) for row in (0, 1)}
    # Class 1: wrong, wrong, right, right, so a precision of 1/2 at a recall of 1.
    assert coco_scores(truth, lured, "bbox")["box_ap50"] == pytest.approx(0.75)
    assert voc_scores(truth, lured)["box_ap50"] == pytest.approx(0.75)


def test_a_second_detection_of_an_object_is_wrong(index):
    doubled = {0: found(BOXES[[0, 0, 1]], (1, 1, 2), (0.9, 0.8, 0.9)), 1: found()}
    # Class 1 in falling order: right, right (image 1), wrong: nothing is lost below full recall.
    assert voc_scores(truth_of(index), doubled)["box_ap50"] == pytest.approx(1.0)
    first = {0: found(BOXES[[0, 0, 1]], (1, 1, 2), (0.99, 0.95, 0.9)), 1: found()}
    expected = (1 + (6 * 1 + 5 * 2 / 3) / 11) / 2
    assert voc_scores(truth_of(index), first)["box_ap50"] == pytest.approx(expected)


@pytest.mark.parametrize("voc", [False, True])
def test_crowds_and_difficult_objects_neither_help_nor_hurt(index, voc):
    truth = truth_of(index, ignored=(True, False), voc=voc)
    with_them, without = {0: found(), 1: found()}, {0: found(BOXES[1:], (2,)), 1: found(BOXES[1:], (2,))}
    assert scores(truth, with_them) == scores(truth, without)
    assert scores(truth, with_them)["box_ap"] == pytest.approx(1.0)
