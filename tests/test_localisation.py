"""Localisation scores on cases worked by hand, and true boxes from label files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dali_views import SampleIndex
from dali_views.tools.scenes import make_scenes
from trainers.evaluate.box_scores import CENTRE, best_threshold, localisation, reference


class Boxes:
    """Ragged true boxes of a few images."""

    def __init__(self, *boxes: list[list[float]]) -> None:
        self.boxes = boxes

    def __len__(self) -> int:
        return len(self.boxes)

    def truth(self, i: int) -> npt.NDArray[np.float32]:
        return np.array(self.boxes[i], dtype=np.float32).reshape(-1, 4)


def test_the_best_true_box_and_corloc_as_worked_by_hand() -> None:
    index = Boxes(
        [],
        [[0, 0, 0.5, 0.5], [0.5, 0, 1, 1]],  # prediction equals the smaller one
        [],
        [[0, 0, 1, 0.5]],  # half overlaps: 0.5 of union 1
        [[0.8, 0.8, 1, 1]],  # missed
        [],
    )
    predicted = [[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0.5, 0.5], [0, 0, 0, 0]]
    scores = localisation(np.array(predicted, dtype=float), index)
    assert scores["images"] == 3
    assert scores["iou_best"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert scores["corloc"] == pytest.approx(2 / 3)


def test_the_references_are_the_centre_half_and_the_whole_image() -> None:
    scores = reference(Boxes([list(CENTRE)], [[0, 0, 1, 1]]))
    assert scores["centre"]["iou_best"] == pytest.approx((1 + 0.25) / 2)
    assert scores["whole"]["iou_best"] == pytest.approx((0.25 + 1) / 2)
    assert scores["whole"]["corloc"] == pytest.approx(0.5)


def test_without_any_true_box_scores_are_not_numbers() -> None:
    scores = localisation(np.zeros((2, 4)), Boxes([], []))
    assert scores["images"] == 0
    assert np.isnan([scores["iou_best"], scores["corloc"]]).all()


def test_the_best_threshold_is_that_of_the_greatest_mean_iou_and_its_area_the_median() -> None:
    index = Boxes([[0, 0, 0.5, 0.5]], [[0, 0, 1, 1]], [[0, 0, 0.5, 1]])
    whole = [[0.0, 0, 1, 1]] * 3  # 0.25, 1, 0.5
    better = [[0.0, 0, 0.5, 1], [0, 0, 1, 1], [0, 0, 0.5, 1]]  # 0.5, 1, 1
    worse = [[0.0, 0, 0.1, 0.1]] * 3
    scores = best_threshold(np.array([whole, better, worse]), index, (0.1, 0.5, 0.9))
    assert scores["threshold"] == 0.5
    assert scores["iou_best"] == pytest.approx(2.5 / 3)
    assert scores["area"] == 0.5


def test_random_reference_boxes_are_crops_inside_the_image_and_the_same_every_time() -> None:
    index = Boxes(*[[[0, 0, 1, 1]]] * 2000)
    scores = reference(index)["random"]
    # The IoU with the whole image is the area: 0.6 on average, less what does not fit at wide ratios.
    assert 0.55 < scores["iou_best"] < 0.6
    assert reference(index)["random"] == scores


def yolo(index: SampleIndex, labels: Path) -> Path:
    """YOLO's label files of an index's true boxes; that of the first image is empty, the second has none."""
    labels.mkdir(parents=True)
    for row in range(len(index)):
        y0, x0, y1, x1 = index.truth(row).T.astype(float)
        lines = zip((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, strict=True)
        text = "".join(f"3 {' '.join(f'{value:.6f}' for value in line)}\n" for line in lines)
        if row != 1:
            (labels / Path(index.path(row)).with_suffix(".txt").name).write_text(text if row else "")
    return labels


def test_label_files_of_yolo_are_the_true_boxes_of_images_beside_them(tmp_path: Path) -> None:
    images, instances = make_scenes(tmp_path / "set", 6, size=64)
    (tmp_path / "set" / "images" / "train").mkdir()
    true = SampleIndex.from_coco(images, instances, cache=False, progress=False)
    labels = yolo(true, tmp_path / "set" / "labels" / "train")
    for name in sorted(path.name for path in images.glob("*.jpg")):
        (images / name).rename(images / "train" / name)
    whole = tmp_path / "set"
    for root, folder in (
        (images / "train", labels),
        (images, labels),
        (images, labels.parent),
        (whole, labels.parent),
    ):
        plain = SampleIndex.from_folder(root, cache=False, progress=False)
        found = plain.with_boxes(folder)
        assert [len(found.truth(row)) for row in (0, 1)] == [0, 0]
        for row in range(2, 6):
            np.testing.assert_allclose(found.truth(row), true.truth(row), atol=1e-5)
    for wrong in (
        "3 0.5 0.5 0.2",
        "0.5 0.5 0.5 0.2 0.2",
        "3 0.5 0.5 1.2 0.2",
        "3 0.5 0.5 0 0.2",
        "a 0 0 0.2 0.2",
    ):
        (labels / "000003.txt").write_text(f"3 0.5 0.5 0.2 0.2\n\n{wrong}\n")
        with pytest.raises(ValueError, match=r"Line 3 of '.*train/000003\.txt' is not `class cx cy w h`"):
            plain.with_boxes(labels)
    with pytest.raises(ValueError, match="holds no label file"):
        plain.with_boxes(images)
