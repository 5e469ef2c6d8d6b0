"""Random partners and those of the same label against chance; precision against a hand's work."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from trainers.guides.partners import label_partners, precision, random_partners


def test_random_partners_are_all_others_with_equal_probability():
    n, seeds = 8, 1400
    drawn = torch.stack([random_partners(n, seed) for seed in range(seeds)])
    assert not (drawn == torch.arange(n)).any()
    for row in range(n):
        counts = torch.bincount(drawn[:, row], minlength=n)
        others = counts[torch.arange(n) != row]
        assert counts[row] == 0
        assert chisquare(others.numpy()).pvalue > 1e-4
    assert random_partners(2, 5).tolist() == [1, 0]


def test_partners_of_the_same_label_are_all_of_them_with_equal_probability():
    labels = torch.tensor([3, 7, 3, -1, 3, 9, 7, 3, -1, 3])
    drawn = torch.stack([label_partners(labels, seed) for seed in range(1400)])
    assert (labels[drawn] == labels).all()
    assert (drawn[:, [3, 5, 8]] == torch.tensor([3, 5, 8])).all()  # unknown, or the only one
    assert drawn[0, [1, 6]].tolist() == [6, 1]
    for row in (0, 2, 4, 7, 9):
        counts = torch.bincount(drawn[:, row], minlength=10)
        others = [i for i in (0, 2, 4, 7, 9) if i != row]
        assert counts.sum() == counts[others].sum()
        assert chisquare(counts[others].numpy()).pvalue > 1e-4


def test_controls_are_functions_of_the_seed_and_the_same_for_an_anchor_whoever_else_is_one():
    labels = np.arange(500, dtype=np.int32) % 9
    anchors = torch.tensor([8, 499, 3])
    rest = torch.ones(500, dtype=torch.bool).index_fill(0, anchors, False)
    for control in (lambda *a: random_partners(500, *a), lambda *a: label_partners(labels, *a)):
        whole, some = control(11), control(11, anchors)
        assert torch.equal(whole, control(11))
        assert (whole != control(12)).float().mean() > 0.9
        assert torch.equal(some[anchors], whole[anchors])
        assert torch.equal(some[rest], torch.arange(500)[rest])
    with pytest.raises(ValueError, match="at least 2"):
        random_partners(1, 0)
    with pytest.raises(ValueError, match="rows of 500"):
        label_partners(labels, 0, torch.tensor([500]))


def test_precision_as_worked_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, -1, 2])
    partner = torch.tensor([1, 3, 2, 4, 3, 0, 5])  # 2 is alone, 5 and the partner of 6 are unknown
    cosines = torch.tensor([0.9, 0.2, math.nan, 0.7, 0.8, 0.5, 0.6])
    found = precision(partner, labels, cosines, bands=2)
    assert found["pairs"] == 4
    assert found["precision"] == pytest.approx(3 / 4)  # all but 1 -> 3
    # Of the 5 others whose label is known, 2 share that of 0 and of 1; 1 shares that of 3 and of 4.
    assert found["chance"] == pytest.approx((2 / 5 + 2 / 5 + 1 / 5 + 1 / 5) / 4)
    low, high = found["bands"]
    assert low == {
        "low": pytest.approx(0.2), "high": pytest.approx(0.7), "precision": 0.5, "pairs": 2,
    }  # fmt: skip
    assert high == {"low": pytest.approx(0.8), "high": pytest.approx(0.9), "precision": 1.0, "pairs": 2}
    assert "bands" not in precision(partner, labels)
    deciles = precision(partner, labels, cosines)["bands"]
    assert [band["pairs"] for band in deciles] == [1] * 4 + [0] * 6
    assert math.isnan(deciles[-1]["precision"])


def test_precision_of_nothing_is_no_number_and_random_partners_are_at_chance():
    alone = precision(torch.arange(3), torch.tensor([0, 0, 1]), torch.full((3,), math.nan))
    assert alone["pairs"] == 0
    assert math.isnan(alone["precision"])
    assert math.isnan(alone["chance"])
    assert len(alone["bands"]) == 10
    assert precision(torch.tensor([1, 0]), np.full(2, -1))["pairs"] == 0
    labels = torch.arange(20_000) % 4
    found = precision(random_partners(20_000, 0), labels)
    assert found["chance"] == pytest.approx(4999 / 19_999)
    assert found["precision"] == pytest.approx(found["chance"], abs=5 * math.sqrt(0.25 * 0.75 / 20_000))
    assert precision(label_partners(labels, 0), labels)["precision"] == 1
    with pytest.raises(ValueError, match="same images"):
        precision(torch.arange(3), torch.zeros(2))
