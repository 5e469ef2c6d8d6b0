"""Tables of made-up runs: statistics worked by hand, the best, paired differences; what is not compared."""

from __future__ import annotations

import pytest

from trainers.compare_table import Row, Run, difference, mean_and_deviation, table


def test_statistics_are_those_worked_by_hand():
    assert mean_and_deviation([0.25]) == (0.25, None)
    assert mean_and_deviation([1, 2, 6]) == (3, pytest.approx(7**0.5))  # (4 + 1 + 9) / 2
    # Differences 1, 3 and 8: mean 4, deviations -3, -1 and 4, variance 26 / 2, error sqrt(13 / 3).
    one, other = {0: 2.0, 1: 5.0, 2: 9.0, 7: 100.0}, {2: 1.0, 1: 2.0, 0: 1.0}
    assert difference(one, other) == (4, pytest.approx((13 / 3) ** 0.5))
    assert difference({0: 2.0}, {0: 1.5}) == (0.5, None)
    assert difference({0: 2.0}, {1: 1.5}) is None


def test_the_table_marks_the_best_and_gives_differences_paired_by_seed():
    a = [Run("a", seed, knn_top1=top, iou=0.5, seconds=9) for seed, top in enumerate((0.5, 0.6))]
    b = [Run("b", seed, knn_top1=top, iou=0.25, seconds=5) for seed, top in enumerate((0.55, 0.75))]
    untrained = Row("untrained", (Run("untrained", 0, knn_top1=0.9),), reference=True)
    head, _, reference, first, second, apart, *_ = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in table([untrained, Row("a", tuple(a)), Row("b", tuple(b))]).splitlines()
    ]
    assert head == ["seeds", "kNN top-1 %", "IoU", "seconds"]
    assert reference == ["untrained", "1", "90.00", "-", "-"]
    assert first == ["a", "2", "55.00 ± 7.07", "0.500 ± 0.000*", "9"]
    assert second == ["b", "2", "65.00 ± 14.14*", "0.250 ± 0.000", "5"]
    # 5 and 15 points more: mean 10, deviation sqrt(50), error 5.
    assert apart[:4] == ["b - a", "", "+10.00 ± 5.00", "-0.250 ± 0.000"]


def test_scores_of_boxes_that_are_read_off_differently_are_neither_ranked_nor_subtracted():
    a = Run("a", 0, knn_top1=0.5, iou=0.5, localisation="layer3 over 0.5 at 64 pixels")
    b = Run("b", 0, knn_top1=0.6, iou=0.6, localisation="last stage over 0.1 at 32 pixels")
    text = table([Row("a", (a,)), Row("b", (b,))])
    assert "60.00*" in text
    assert "0.600*" not in text
    assert "+0.100" not in text
    assert "a layer3 over 0.5 at 64 pixels; b last stage over 0.1 at 32 pixels" in text
