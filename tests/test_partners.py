"""Partners against loops in float64, on one rank and two; the controls against chance, their precision."""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.stats import chisquare
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from trainers.guides.partners import find_partners, label_partners, precision, random_partners

BANDS: list[tuple[Any, tuple[float, float]]] = [
    ("absolute", (0.2, 0.9)), ("absolute", (-1, 1)), ("quantile", (0.5, 0.9)), ("quantile", (0.9, 1)),
]  # fmt: skip


def features_of(n: int, dim: int = 6, seed: int = 0) -> Tensor:
    """Features of any length around a few centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, dim, generator=generator)
    noise = torch.randn(n, dim, generator=generator)
    return 3 * (centres[torch.randint(5, (n,), generator=generator)] + 0.7 * noise)


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def plain_search(
    features: Tensor, kind: str, band: tuple[float, float], anchors: list[int]
) -> tuple[list[int], list[float]]:
    """Partner and cosine of every image, by comparing everything with everything."""
    n = len(features)
    if kind == "quantile":
        every = [cosine(features[i], features[j]) for i, j in combinations(range(n), 2)]
        low, high = np.quantile(every, band)
    else:
        low, high = band
    partner, similarity = list(range(n)), [math.nan] * n
    for i in anchors:
        found = [(cosine(features[i], features[j]), -j) for j in range(n) if j != i]
        inside = [pair for pair in found if low - 1e-6 <= pair[0] <= high + 1e-6]
        if inside:
            similarity[i], partner[i] = max(inside)[0], -max(inside)[1]
    return partner, similarity


@pytest.mark.parametrize("chunk", [1, 7, 30])
@pytest.mark.parametrize(("kind", "band"), BANDS)
def test_partners_are_those_of_a_plain_loop_in_tiles_of_any_size(kind, band, chunk):
    features = features_of(30)
    found = find_partners(features, band=band, kind=kind, chunk=chunk, progress=False)
    partner, similarity = plain_search(features, kind, band, list(range(30)))
    assert found.partner.tolist() == partner
    torch.testing.assert_close(found.cosine, torch.tensor(similarity), atol=1e-6, rtol=0, equal_nan=True)
    inside = found.cosine[found.partner != torch.arange(30)]
    assert len(inside) > 10
    assert ((inside >= found.band[0] - 1e-6) & (inside <= found.band[1] + 1e-6)).all()


def test_only_anchors_get_partners_and_who_has_none_in_the_band_stays_alone():
    features = features_of(30)
    anchors = torch.tensor([4, 29, 0, 11])
    found = find_partners(features, band=(-1, 1), anchors=anchors, progress=False)
    partner, _ = plain_search(features, "absolute", (-1, 1), anchors.tolist())
    assert found.partner.tolist() == partner
    assert (found.partner != torch.arange(30)).sum() == 4
    assert found.cosine.isnan().sum() == 26
    orthogonal = find_partners(torch.eye(4), band=(0.5, 1), progress=False)
    assert orthogonal.partner.tolist() == [0, 1, 2, 3]
    assert orthogonal.cosine.isnan().all()


def test_exact_duplicates_of_any_scale_fall_out_by_the_upper_bound_alone():
    features = features_of(40)
    copied = torch.cat([features, 0.37 * features]).half()
    rows = torch.arange(80)
    duplicate = (rows + 40) % 80
    free = find_partners(copied, band=(-1, 1), progress=False)
    bound = find_partners(copied, band=(-1, 0.9995), progress=False)
    assert torch.equal(free.partner, duplicate)
    assert (free.cosine <= 1).all()
    assert ((bound.partner != duplicate) & (bound.partner != rows)).all()
    assert (bound.cosine <= 0.9995).all()


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_of_equally_similar_images_the_first_is_taken(chunk):
    a, b = [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, -0.5]  # exact in float32, cosine 0.5
    found = find_partners(torch.tensor([b, a, a, b, a, b, b, a]), band=(-1, 0.9), chunk=chunk, progress=False)
    assert found.partner.tolist() == [1, 0, 0, 1, 0, 1, 1, 0]
    assert found.cosine.tolist() == [0.5] * 8


def test_a_row_of_zeros_has_no_partner_and_is_nobodys():
    features = -features_of(12).abs()
    features[::2] *= -1  # the cosine of an even and an odd row is negative, of a row of zeros it would be 0
    features[3] = 0
    found = find_partners(features, band=(-1, 0.1), progress=False)
    assert found.partner[3] == 3
    assert not (found.partner == 3)[[0, 1, 2, *range(4, 12)]].any()


def test_quantiles_from_a_sample_of_pairs_are_near_those_of_all_and_hang_on_the_seed_alone():
    features = features_of(300)
    how = {"band": (0.1, 0.99), "kind": "quantile", "progress": False}
    every, again, tiled, other = (
        find_partners(features, pairs=pairs, seed=seed, chunk=chunk, **how)
        for pairs, seed, chunk in ((10**6, 0, None), (20_000, 1, None), (20_000, 1, 50), (20_000, 2, None))
    )
    assert tiled.band == again.band != other.band
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    cosines = (unit @ unit.T)[tuple(torch.triu_indices(300, 300, 1))]
    for found in (again, other):
        shares = [float((cosines <= bound).double().mean()) for bound in found.band]
        # Five deviations of a share of 20,000.
        assert shares == [pytest.approx(0.1, abs=0.0107), pytest.approx(0.99, abs=0.0036)]
    assert [float((cosines <= b).double().mean()) for b in every.band] == pytest.approx([0.1, 0.99], abs=1e-4)
    assert find_partners(features, band=(0, 1), kind="quantile", progress=False).band == (-1, 1)


def test_a_quantile_that_the_pairs_cannot_resolve_is_refused():
    features = features_of(500)
    for count, band, pairs in ((500, (0.5, 0.9999), 5000), (30, (0.01, 0.5), 435)):
        with pytest.raises(ValueError, match=f"{pairs} pairs.* nearer 0\\.5"):
            find_partners(features[:count], band=band, kind="quantile", pairs=5000, progress=False)
    resolved = find_partners(features, band=(0.5, 0.9999), kind="quantile", pairs=100_000, progress=False)
    assert resolved.band[1] > resolved.band[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"band": (0.9, 0.5)}, "low < high"),
        ({"band": (-1.1, 0.5)}, "-1 <= low"),
        ({"band": (0.5, math.nan)}, "low < high"),
        ({"band": (-0.1, 0.5), "kind": "quantile"}, "0 <= low"),
        ({"features": torch.tensor([[1.0, 2], [3, math.nan]])}, "not finite"),
        ({"features": torch.zeros(9, 2), "kind": "quantile", "band": (0.4, 0.6)}, "all features are zeros"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes, message):
    arguments = {"features": features_of(30), "band": (0.1, 0.9), "progress": False, **changes}
    with pytest.raises(ValueError, match=message):
        find_partners(arguments.pop("features"), **arguments)


def searches() -> dict[str, Any]:
    """What all ranks must agree on, each time in another way of sharing out."""
    found: dict[str, Any] = {}
    for number, (kind, band) in enumerate(BANDS):
        found[f"all {number}"] = find_partners(features_of(31), band=band, kind=kind, progress=False)
    for name, anchors in (("some", [30, 2, 17]), ("one", [9]), ("none", [])):
        rows = torch.tensor(anchors, dtype=torch.long)
        found[name] = find_partners(features_of(31), band=(-1, 1), anchors=rows, chunk=4, progress=False)
    found["sample"] = find_partners(
        features_of(100), band=(0.2, 0.9), kind="quantile", pairs=1001, progress=False
    )
    return {name: list(each) if isinstance(each, tuple) else each for name, each in found.items()}


def search_on_one_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(searches(), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_find_the_same_as_one_and_as_each_other(tmp_path):
    start_processes(search_on_one_rank, args=(tmp_path,), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, (partner, similarity, band) in searches().items():
        for rank in ranks:
            assert torch.equal(rank[name][0], partner), name
            torch.testing.assert_close(rank[name][1], similarity, atol=1e-6, rtol=0, equal_nan=True)
            assert rank[name][2] == pytest.approx(band, abs=1e-6)


@pytest.mark.parametrize("labels", [[0] * 8, [3, 7, 3, -1, 3, 9, 7, 3, -1, 3]])
def test_controls_draw_all_others_of_the_label_with_equal_probability(labels):
    """Any other image at random is the same with one label."""
    known, n = torch.tensor(labels), len(labels)
    draw = (lambda seed: random_partners(n, seed)) if not any(labels) else partial(label_partners, known)
    drawn = torch.stack([draw(seed) for seed in range(1400)])
    assert (known[drawn] == known).all()
    for row, label in enumerate(labels):
        others = [i for i in range(n) if i != row and labels[i] == label != -1]
        counts = torch.bincount(drawn[:, row], minlength=n)
        if not others:  # unknown, or the only one
            assert counts[row] == 1400
            continue
        assert counts.sum() == counts[others].sum()
        assert len(others) == 1 or chisquare(counts[others].numpy()).pvalue > 1e-4


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


def test_precision_as_worked_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, -1, 2])
    partner = torch.tensor([1, 3, 2, 4, 3, 0, 5])  # 2 is alone, 5 and the partner of 6 are unknown
    cosines = torch.tensor([0.9, 0.2, math.nan, 0.7, 0.8, 0.5, 0.6])
    found = precision(partner, labels, cosines, bands=2)
    assert found["pairs"] == 4
    assert found["precision"] == pytest.approx(3 / 4)  # all but 1 -> 3
    # Of the 5 others whose label is known, 2 share that of 0 and of 1; 1 shares that of 3 and of 4.
    assert found["chance"] == pytest.approx((2 / 5 + 2 / 5 + 1 / 5 + 1 / 5) / 4)
    edges = [pytest.approx([0.2, 0.7, 0.5, 2]), pytest.approx([0.8, 0.9, 1.0, 2])]
    assert [[band[key] for key in ("low", "high", "precision", "pairs")] for band in found["bands"]] == edges
    deciles = precision(partner, labels, cosines)["bands"]
    assert [band["pairs"] for band in deciles] == [1] * 4 + [0] * 6


def test_precision_of_nothing_is_no_number_and_random_partners_are_at_chance():
    alone = precision(torch.arange(3), torch.tensor([0, 0, 1]), torch.full((3,), math.nan))
    assert (alone["pairs"], len(alone["bands"])) == (0, 10)
    assert np.isnan([alone["precision"], alone["chance"]]).all()
    labels = torch.arange(20_000) % 4
    found = precision(random_partners(20_000, 0), labels)
    assert found["chance"] == pytest.approx(4999 / 19_999)
    assert found["precision"] == pytest.approx(found["chance"], abs=5 * math.sqrt(0.25 * 0.75 / 20_000))
    assert precision(label_partners(labels, 0), labels)["precision"] == 1
