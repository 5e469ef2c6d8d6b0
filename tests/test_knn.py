"""kNN against a plain loop, and the collection of features."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from trainers.evaluate import knn
from trainers.evaluate.knn import extract, knn_accuracy, share


def plain_knn(bank: Tensor, labels: Tensor, tests: Tensor, answers: Tensor, k: int, t: float) -> list[float]:
    top1 = top5 = asked = 0
    for test, answer in zip(tests.double(), answers.tolist(), strict=True):
        if answer < 0:
            continue
        asked += 1
        cosines = []
        for row, label in zip(bank.double(), labels.tolist(), strict=True):
            if label >= 0:
                cosines.append((float(row @ test / (row.norm() * test.norm())), label))
        votes: dict[int, float] = {}
        for cosine, label in sorted(cosines, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / t)
        ranked = sorted(votes, key=lambda label: -votes[label])
        top1 += answer == ranked[0]
        top5 += answer in ranked[:5]
    return [top1 / asked, top5 / asked]


@pytest.mark.parametrize(
    ("k", "temperature", "chunk"), [(1, 0.07, 7), (5, 0.07, 1000), (20, 0.5, 1), (999, 0.1, 64)]
)
def test_accuracy_equals_a_plain_loop(k: int, temperature: float, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(9, 6, generator=generator)
    bank_labels = torch.randint(-1, 9, (80,), generator=generator)
    test_labels = torch.randint(-1, 9, (50,), generator=generator)
    bank = centres[bank_labels] + 1.2 * torch.randn(80, 6, generator=generator)
    tests = centres[test_labels] + 1.2 * torch.randn(50, 6, generator=generator)
    ours = knn_accuracy(bank, bank_labels, tests, test_labels, k, temperature, chunk)
    assert [ours["top1"], ours["top5"]] == pytest.approx(
        plain_knn(bank, bank_labels, tests, test_labels, k, temperature)
    )
    assert 0.2 < ours["top1"] < 1


def test_a_low_temperature_does_not_overflow_and_few_classes_are_fine() -> None:
    features, labels = torch.eye(3), torch.tensor([0, 1, 1])
    found = knn_accuracy(features, labels, features, labels, k=3, temperature=0.001)
    assert found == {"top1": 1.0, "top5": 1.0}


def test_a_share_of_the_bank_is_compared_in_tiles_and_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, tests = (torch.randn(rows, 6, generator=generator).half() for rows in (80, 50))
    labels, answers = (torch.randint(-1, 9, (rows,), generator=generator) for rows in (80, 50))
    for rows in (1, 7, 79, 80, 1000):
        monkeypatch.setattr(knn, "_TILE", 6 * rows)
        ours = knn_accuracy(bank, labels, tests, answers, 20, 0.1, chunk=7)
        plain = plain_knn(bank.float(), labels, tests.float(), answers, 20, 0.1)
        assert [ours["top1"], ours["top5"]] == pytest.approx(plain)


def test_missing_labels_are_refused() -> None:
    features, none, labels = torch.eye(3), torch.full((3,), -1), torch.tensor([0, 1, 1])
    for side, bank, tests in (("training", none, labels), ("test", labels, none)):
        with pytest.raises(ValueError, match=f"no {side} sample has a label"):
            knn_accuracy(features, bank, features, tests)


def batches(rows: list[list[int]]) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(views=[row.float()[:, None] * torch.ones(3)], label=row % 4, index=row)
        for row in map(torch.tensor, rows)
    ]


def test_features_come_in_index_order_and_once_and_the_mode_is_restored() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3, affine=False, eps=0.0)).train()
    features, labels, index = extract(net, batches([[5, 2, 9], [0, 5]]), "cpu")
    assert index.tolist() == [0, 2, 5, 9]
    assert features[:, 0].tolist() == [0, 2, 5, 9]
    assert labels.tolist() == [0, 2, 1, 1]
    assert net.training
    assert net.get_buffer("0.num_batches_tracked").item() == 0
    with pytest.raises(ValueError, match="no batch"):
        extract(net, [], "cpu")


class Batches(list):
    """In place of a loader of whole batches."""

    batch_size = 3


def test_a_share_has_each_sample_once_with_a_label_in_rows_of_length_1() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3, affine=False, eps=0.0)).train()
    features, labels = share(net, Batches(batches([[5, 2, 9], [0, 5]])), "cpu")  # type: ignore[arg-type]
    assert labels.tolist() == [1, 2, 1, 0, -1]
    assert features.dtype == torch.float16
    torch.testing.assert_close(
        features.float().norm(dim=1), torch.tensor([1.0, 1, 1, 0, 1]), atol=1e-3, rtol=0
    )
    assert net.training
    with pytest.raises(ValueError, match="no batch"):
        share(net, Batches(), "cpu")  # type: ignore[arg-type]
