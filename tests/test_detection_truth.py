"""Objects of COCO's JSON and VOC's XML: what is read, and what one sentence says about wrong ones."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_tools

from dali_views import SampleIndex
from dali_views.tools.scenes import run_lengths
from trainers.detect.truth import _unpacked, read_truth

BOX = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [2, 4, 10, 8], "area": 80, "iscrowd": 0}


def coco(
    folder: Path, change: Callable[[dict[str, Any]], object] = lambda data: None
) -> tuple[SampleIndex, str]:
    """Three images of 32 x 48 pixels: a box in the first, a crowd in the second, nothing in the third."""
    (folder / "images").mkdir(parents=True)
    images = [{"id": 7 + i, "file_name": f"{i}.png", "height": 32, "width": 48} for i in range(3)]
    for image in images:
        Image.new("RGB", (48, 32)).save(folder / "images" / image["file_name"])
    crowd = {**BOX, "id": 2, "image_id": 8, "iscrowd": 1, "segmentation": run_lengths(np.eye(32, 48) > 0)}
    kinds = [{"id": 3, "name": "cat"}, {"id": 1, "name": "dog"}]
    data = {"images": images, "annotations": [dict(BOX), crowd], "categories": kinds}
    change(data)
    (folder / "instances.json").write_text(json.dumps(data))
    index = SampleIndex.from_folder(folder / "images", cache=False, progress=False)
    return index, str(folder / "instances.json")


def test_coco_as_files_and_in_shards(tmp_path):
    index, file = coco(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("2.png", "0.png"):
            tar.add(tmp_path / "images" / name, name)
    truth = read_truth(index, [file])
    assert truth.classes == ["dog", "cat"], "by number"
    assert [len(each.boxes) for each in truth.objects] == [1, 1, 0], "empty images can be tested on"
    assert truth.objects[0].boxes.tolist() == [[2, 4, 12, 12]]
    assert truth.objects[0].labels.tolist() == [2]
    assert truth.objects[1].ignored.tolist() == [True]
    trained = truth.with_objects()
    assert [Path(trained.index.path(row)).name for row in range(len(trained.index))] == ["0.png"]
    assert not truth.masked
    packed = read_truth(SampleIndex.from_shards(tmp_path / "a.tar", cache=False, progress=False), [file])
    assert sorted(len(each.boxes) for each in packed.objects) == [0, 1]


def test_voc(tmp_path):
    home = tmp_path / "VOC2007"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (home / part).mkdir(parents=True)
    for name in ("000001", "000002"):
        Image.new("RGB", (40, 30)).save(home / "JPEGImages" / f"{name}.jpg")
        (home / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>40</width><height>30</height></size>"
            "<object><name>dog</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>1</ymin>"
            "<xmax>40</xmax><ymax>15</ymax></bndbox></object></annotation>"
        )
    lists = home / "ImageSets" / "Main" / "test.txt"
    lists.write_text("000002\n")
    truth = read_truth(SampleIndex.from_folder(tmp_path, cache=False, progress=False), [str(lists)])
    assert len(truth.index) == 1
    assert truth.index.path(0).endswith("000002.jpg")
    assert truth.voc
    assert truth.objects[0].boxes.tolist() == [[0, 0, 40, 15]], "counted from 1, the last pixel included"
    assert truth.objects[0].ignored.tolist() == truth.objects[0].trained.tolist() == [True]


def _first(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["annotations"][0].update(changes)


TINY = run_lengths(np.eye(3) > 0)
FEW, NEGATIVE, CUT = ({"size": [32, 48], "counts": counts} for counts in ([1, 2], [-1, 1537], "%%"))
WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "none of 3 images has a box to train on": lambda data: data["annotations"].clear(),
    "the category 3 occurs 2 times": lambda data: data["categories"].append({"id": 3, "name": "cow"}),
    "the category 'cat' occurs 2 times": lambda data: data["categories"].append({"id": 4, "name": "cat"}),
    "annotation 1 is of an unknown category": _first(category_id=9),
    "a mask of 0.png has 3 x 3 pixels, and the image 32 x 48": _first(segmentation=TINY),
    "the run lengths of a mask of 0.png do not fill the image": _first(segmentation=FEW),
    "run lengths of a mask of 0.png do not fill the image; correct": _first(segmentation=NEGATIVE),
    "lengths of a mask of 0.png do not fill the image; correct": _first(segmentation=CUT),
    r"a mask of 0.png is not run lengths \(KeyError": _first(segmentation={"counts": [1536]}),
    "the box of annotation 1 is not four numbers": _first(bbox=[1, 2, 3]),
    "a polygon of 0.png is not a list of three": _first(segmentation=[[1, 2, 3, 4, 5, "x"]]),
    "polygon of 0.png is not a list of three": _first(segmentation=[[1, 2, 3, 4, 5, float("nan")]]),
    "of 0.png is not a list of three": _first(segmentation=7),
    "a polygon of 0.png is not a list": _first(segmentation=[[1, 2, 3]]),
    "0.png has 32 x 48 pixels, and its annotations are for 32 x 50": lambda data: data["images"][0].update(
        width=50
    ),
    "none of the 1 images in .* is in": lambda data: data.update(
        images=[{"id": 7, "file_name": "x.png", "height": 1, "width": 1}], annotations=[]
    ),
    "no annotations of COCO or VOC": lambda data: data.pop("categories"),
}  # fmt: skip


@pytest.mark.parametrize("told", WRONG)
def test_wrong_annotations_are_one_sentence(told, tmp_path):
    index, file = coco(tmp_path, WRONG[told])
    with pytest.raises(ValueError, match=told):
        read_truth(index, [file]).with_objects()


def test_run_lengths_in_coco_s_string_are_read(tmp_path):
    random = np.random.default_rng(0)
    for shape in ((32, 48), (1, 7), (200, 300)):
        for share in (0.0, 0.02, 0.5, 1.0):
            mask = np.asfortranarray(np.repeat(random.random(shape) < share, 1 + shape[0] // 50, axis=0))
            text = mask_tools.encode(mask.astype(np.uint8))["counts"].decode()
            assert _unpacked(text) == run_lengths(mask)["counts"] or not share


def test_boxes_are_cut_at_the_image_and_those_outside_are_named(tmp_path):
    def change(data: dict[str, Any]) -> None:
        data["annotations"] = [
            {**BOX, "bbox": box} for box in ([40, 20, 90, 90], [60, 4, 10, 8], [5, 5, 0, 3])
        ]

    index, file = coco(tmp_path, change)
    with pytest.warns(UserWarning, match="2 boxes have no area inside their image .* the first is of 0.png"):
        truth = read_truth(index, [file])
    assert truth.objects[0].boxes.tolist() == [[40, 20, 48, 32]]


def test_test_images_need_the_categories_of_the_training_images(tmp_path):
    index, file = coco(tmp_path)
    with pytest.raises(ValueError, match="other categories than the training images, such as 'cat'"):
        read_truth(index, [file], ["dog"])
