"""Every loss against its formula in plain loops and double precision, and its gradients."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainers.methods.byol import squared_distance
from trainers.methods.dino import across_views, cross_entropy
from trainers.methods.method import are_kin, log_ratio
from trainers.methods.moco import info_nce
from trainers.methods.networks import PrototypeHead
from trainers.methods.scfs import feature_search
from trainers.methods.simclr import nt_xent
from trainers.methods.simsiam import negative_cosine


@pytest.fixture
def draw() -> Any:
    """Random float64 tensors of a shape, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.tolist(), b.tolist()
    dot = sum(p * q for p, q in zip(x, y, strict=True))
    return dot / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(value - max(logits)) for value in logits]
    return [power / sum(powers) for power in powers]


def entropy_between(teacher: Tensor, student: Tensor) -> float:
    pairs = zip(softmax(teacher.tolist()), softmax(student.tolist()), strict=True)
    return -sum(p * math.log(q) for p, q in pairs)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_compares_each_view_with_all_others_of_the_batch(draw: Any, temperature: float) -> None:
    first, second = draw(2, 5, 6)
    z = [*first, *second]
    expected = [0.0] * 5
    for i in range(10):
        others = [math.exp(cosine(z[i], z[k]) / temperature) for k in range(10) if k != i]
        positive = math.exp(cosine(z[i], z[(i + 5) % 10]) / temperature)
        expected[i % 5] += -math.log(positive / sum(others)) / 2
    assert nt_xent(first, second, temperature).tolist() == pytest.approx(expected, abs=1e-12)
    assert nt_xent(first.float(), second.float(), temperature).tolist() == pytest.approx(expected, rel=1e-5)


def test_an_image_and_its_partner_are_no_negatives_of_each_other(draw: Any) -> None:
    first, second = draw(2, 4, 6)
    z = [*first, *second]
    kin = torch.tensor([[10, 11], [11, 11], [12, 13], [10, 10]])  # 0 has 1 for a partner; 3 is 0 again
    apart = {0: {2}, 1: {2, 3}, 2: {0, 1, 3}, 3: {1, 2}}
    expected = [0.0] * 4
    for i in range(8):
        positive = math.exp(cosine(z[i], z[(i + 4) % 8]) / 0.5)
        others = [math.exp(cosine(z[i], z[k]) / 0.5) for k in range(8) if k % 4 in apart[i % 4]]
        expected[i % 4] += -math.log(positive / (positive + sum(others))) / 2
    assert nt_xent(first, second, 0.5, kin).tolist() == pytest.approx(expected, abs=1e-12)
    alone = torch.stack([torch.arange(4), torch.arange(4)], dim=1)
    assert torch.equal(nt_xent(first, second, 0.5, alone), nt_xent(first, second, 0.5))


def test_entries_of_the_queue_that_are_kin_are_left_out(draw: Any) -> None:
    query, key, queue = (normalize(draw(n, 6), dim=1) for n in (2, 2, 3))
    kin, owners = torch.tensor([[5, 6], [7, 7]]), torch.tensor([[6, 9], [8, 5], [-1, -1]])
    excluded = are_kin(kin, owners)
    assert excluded.tolist() == [[True, True, False], [False, False, False]]
    # Whose second views show the same image are kin, too.
    assert are_kin(torch.tensor([[0, 5]]), torch.tensor([[1, 5], [1, 6]])).tolist() == [[True, False]]
    whole, part = info_nce(query, key, queue, 0.2), info_nce(query, key, queue[2:], 0.2)
    found = info_nce(query, key, queue, 0.2, excluded)
    assert found.tolist() == pytest.approx([float(part[0]), float(whole[1])], abs=1e-12)


def test_the_alignment_score_is_the_log_ratio_against_the_other_images(draw: Any) -> None:
    query, key = (normalize(draw(4, 6), dim=1) for _ in range(2))
    expected = []
    for n in range(4):
        others = sum(math.exp(cosine(query[n], query[m])) for m in range(4) if m != n)
        expected.append(math.log(math.exp(cosine(query[n], key[n])) / others))
    assert log_ratio(query, key).tolist() == pytest.approx(expected, abs=1e-12)


def test_info_nce_compares_the_query_with_its_key_and_the_queue(draw: Any) -> None:
    query, key, queue = (normalize(draw(n, 6), dim=1) for n in (4, 4, 9))
    expected = []
    for q, k in zip(query, key, strict=True):
        positive = math.exp(cosine(q, k) / 0.2)
        expected.append(-math.log(positive / (positive + sum(math.exp(cosine(q, n) / 0.2) for n in queue))))
    assert info_nce(query, key, queue, 0.2).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_distances_of_byol_and_simsiam_are_those_of_unit_vectors(draw: Any) -> None:
    first, second = draw(2, 5, 6)
    cosines = [cosine(p, z) for p, z in zip(first, second, strict=True)]
    assert squared_distance(first, second).tolist() == pytest.approx([2 - 2 * c for c in cosines])
    assert negative_cosine(first, second).tolist() == pytest.approx([-c for c in cosines])


def test_dino_averages_over_all_pairs_of_different_views(draw: Any) -> None:
    teacher, student = draw(2, 3, 7) / 0.04, draw(5, 3, 7) / 0.1
    expected = [0.0] * 3
    for sample in range(3):
        pairs = [(t, s) for t in range(2) for s in range(5) if t != s]
        assert len(pairs) == 8
        for t, s in pairs:
            expected[sample] += entropy_between(teacher[t, sample], student[s, sample]) / len(pairs)
    assert across_views(teacher, student).tolist() == pytest.approx(expected, abs=1e-9)
    assert across_views(teacher.float(), student.float()).tolist() == pytest.approx(expected, rel=1e-5)
    assert cross_entropy(teacher[0], student[1]).tolist() == pytest.approx(
        [entropy_between(teacher[0, i], student[1, i]) for i in range(3)]
    )


def test_the_head_gives_cosines_with_the_prototypes(draw: Any) -> None:
    torch.manual_seed(0)
    head = PrototypeHead(6, 8, 5, 4).double()
    features = draw(3, 6)
    logits, unit = head(features), normalize(head.mlp(features), dim=1)
    for row in range(3):
        for prototype in range(4):
            expected = cosine(unit[row], head.last_layer.weight[prototype])
            assert logits[row, prototype].item() == pytest.approx(expected)


def test_feature_search_weighs_every_place_by_its_cosine_with_the_query(draw: Any) -> None:
    queries, features = draw(3, 2, 4), draw(2, 4, 2, 3)
    found = feature_search(queries, features)
    assert found.shape == (3, 2, 4, 2, 3)
    for crop in range(3):
        for sample in range(2):
            for y, x in product(range(2), range(3)):
                place = features[sample, :, y, x]
                weighted = cosine(queries[crop, sample], place) * place
                torch.testing.assert_close(found[crop, sample, :, y, x], weighted)


def test_the_gradients_of_all_losses_are_right(draw: Any) -> None:
    a, b, queue = draw(3, 3, 4)
    a.requires_grad_()
    c = b.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: nt_xent(x, y, 0.5), (a, c))
    assert torch.autograd.gradcheck(lambda q: info_nce(q, b, queue, 0.5), (a,))
    assert torch.autograd.gradcheck(lambda p: squared_distance(p, b), (a,))
    assert torch.autograd.gradcheck(lambda p: negative_cosine(p, b), (a,))
    teacher, student = draw(2, 3, 4), draw(4, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: across_views(teacher, s), (student,))
    assert torch.autograd.gradcheck(
        lambda s: cross_entropy(teacher[0], s), (student[0].detach().requires_grad_(),)
    )
    features = draw(2, 4, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(feature_search, (draw(2, 2, 4).requires_grad_(), features))
