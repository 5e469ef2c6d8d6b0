"""Localisation scores on cases worked by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

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
