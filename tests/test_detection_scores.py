"""Average precision on cases that are known by hand, and as pycocotools has it."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dali_views import SampleIndex
from dali_views.tools.scenes import run_lengths
from trainers.detect.scores import Found, coco_scores, scores, voc_scores
from trainers.detect.truth import Objects, Truth, read_truth

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
    lengths = [mask_tools.frPyObjects(run_lengths(inside(box)), 64, 64) for box in boxes]
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


WIDE, HIGH = (80, 64, 50), (60, 64, 90)  # of the three images of the sets below


@st.composite
def coco_sets(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An instances file of images that exist, and results in COCO's form, many of which overlap an object."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    numbers = random.permutation(1000)[:3].tolist()
    kinds = random.permutation(90)[: random.integers(1, 4)].tolist()
    images = [
        {"id": numbers[i], "file_name": f"{i}.png", "height": HIGH[i], "width": WIDE[i]} for i in range(3)
    ]
    marks: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for i in random.integers(0, 3, draw(st.integers(1, 25))).tolist():
        x, y = random.uniform(0, [WIDE[i] - 9, HIGH[i] - 9])
        box = [x, y, *random.uniform(4, [WIDE[i] - x, HIGH[i] - y])]
        kind, crowd = kinds[random.integers(len(kinds))], bool(random.random() < 0.2)
        corners = [x, y, x + box[2], y, x + box[2], y + box[3], x, y + 0.8 * box[3]]
        shape = mask_tools.decode(mask_tools.frPyObjects([corners], HIGH[i], WIDE[i]))[..., 0]
        mark = {"id": len(marks) + 1, "image_id": numbers[i], "category_id": kind, "bbox": box}
        mark |= {"iscrowd": int(crowd), "area": float(shape.sum() * random.uniform(0.5, 30))}
        marks.append(mark | {"segmentation": run_lengths(shape > 0) if crowd else [corners]})
        for _ in range(random.integers(3)):
            near = [
                max(0, x + random.normal()),
                max(0, y + random.normal()),
                *box[2:] * random.uniform(0.7, 1, 2),
            ]
            part = np.asfortranarray(shape * (random.random(shape.shape) < random.uniform(0.5, 1)))
            lengths = {**(coded := mask_tools.encode(part)), "counts": coded["counts"].decode()}
            result = {"image_id": numbers[i], "category_id": kinds[random.integers(len(kinds))]}
            results.append(result | {"bbox": near, "score": random.random(), "segmentation": lengths})
    categories = [{"id": kind, "name": f"kind {kind}"} for kind in kinds]
    return {"images": images, "annotations": marks, "categories": categories}, results


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    folder = tmp_path_factory.mktemp("three")
    for i in range(3):
        Image.new("RGB", (WIDE[i], HIGH[i])).save(folder / f"{i}.png")
    return SampleIndex.from_folder(folder, cache=False, progress=False)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools 2.0.11
@pytest.mark.parametrize("kind", ["bbox", "segm"])
@settings(deadline=None, max_examples=30)
@given(given_set=coco_sets())
def test_average_precision_is_what_pycocotools_gives_for_the_files_themselves(
    three, tmp_path_factory, kind, given_set
):
    """Boxes, masks, crowds and numbers of images and categories reach it as they are written."""
    data, results = given_set
    file = tmp_path_factory.getbasetemp() / f"{kind}.json"
    file.write_text(json.dumps(data))
    truth = read_truth(three, [str(file)])
    kinds = sorted(each["id"] for each in data["categories"])
    ours = {}
    for row in range(3):
        number = next(e["id"] for e in data["images"] if e["file_name"] == Path(three.path(row)).name)
        mine = [each for each in results if each["image_id"] == number]
        boxes = np.array([each["bbox"] for each in mine]).reshape(-1, 4)
        ours[row] = Found(
            np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
            np.array([kinds.index(each["category_id"]) + 1 for each in mine], np.int64),
            np.array([each["score"] for each in mine]), [each["segmentation"] for each in mine],
        )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        whole = COCO(str(file))
        if results:
            judge = COCOeval(whole, whole.loadRes(results), kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
    expected = np.maximum(judge.stats[:3], 0) if results else np.zeros(3)
    assert list(coco_scores(truth, ours, kind).values()) == pytest.approx(expected.tolist(), abs=1e-9)
