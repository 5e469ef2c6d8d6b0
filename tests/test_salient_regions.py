"""Regions of a heatmap, the saliency of crops, weights of losses, and the gradient map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from dali_views import RegionTable, SampleIndex, View, ViewLoader
from dali_views.maps.boxes import regions_from_maps
from dali_views.maps.heatmap import activation_map, gradient_map
from dali_views.maps.weights import LOWEST_TEMPERATURE, crop_saliency, pair_weights

WHOLE = [0.0, 0.0, 1.0, 1.0]


def on(device: str) -> torch.device:
    return torch.device("cuda" if device == "gpu" else "cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(*parts: tuple[slice, slice, float], size: int = 10) -> Tensor:
    """One map (1, size, size) of rectangles of constant value on 0."""
    maps = torch.zeros(1, size, size)
    for y, x, value in parts:
        maps[0, y, x] = value
    return maps


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    """Where there is a GPU, waiting for it is an error inside."""
    if device == "gpu":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "gpu":
            torch.cuda.set_sync_debug_mode("default")


LEFT = (slice(1, 4), slice(0, 2), 0.5)  # 3 x 2 cells
RIGHT = (slice(6, 10), slice(5, 9), 0.8)  # 4 x 4 cells


# ---- regions


def test_two_blobs_are_two_regions_the_more_salient_one_first_and_the_third_slot_stays_empty(
    device: str,
) -> None:
    boxes, weights = regions_from_maps(blobs(LEFT, RIGHT).to(on(device)), k=3, threshold=0.1)
    assert boxes.device.type == weights.device.type == on(device).type
    assert (boxes.dtype, weights.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(boxes.cpu(), torch.tensor([[[0.6, 0.5, 1, 0.9], [0.1, 0, 0.4, 0.2], WHOLE]]))
    torch.testing.assert_close(weights.cpu(), torch.tensor([[0.8, 0.5, 0]]))


def test_a_part_of_one_percent_stays_and_one_of_nine_tenths_of_a_percent_is_dropped() -> None:
    maps = torch.zeros(1, 25, 40)
    maps[0, 0:3, 0:3] = 1.0  # 9 of 1000 cells
    maps[0, 20, 0:10] = 0.5  # 10
    boxes, weights = regions_from_maps(maps, k=2, threshold=0.1)
    torch.testing.assert_close(boxes, torch.tensor([[[0.8, 0, 0.84, 0.25], WHOLE]]))
    assert weights.tolist() == [[0.5, 0]]


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_an_image_without_any_part_is_one_whole_region_of_weight_one(value: float) -> None:
    boxes, weights = regions_from_maps(torch.full((2, 4, 5), value), k=3, threshold=0.3)
    assert boxes.tolist() == [[WHOLE] * 3] * 2
    assert weights.tolist() == [[1, 0, 0]] * 2


def looped(
    heatmap: Tensor, k: int, threshold: float, min_area: float, expand: float, size: tuple[int, int] | None
) -> tuple[list[list[float]], list[float]]:
    """Boxes and weights of one map (h, w), cell by cell."""
    if size is not None:
        heatmap = F.interpolate(heatmap[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    cells = heatmap.tolist()
    height, width = len(cells), len(cells[0])
    left = {(y, x) for y in range(height) for x in range(width) if cells[y][x] > threshold}
    found = []
    while left:
        part, edge = set(), [min(left)]
        while edge:
            y, x = edge.pop()
            if (y, x) in left:
                left.remove((y, x))
                part.add((y, x))
                edge += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        if len(part) / (height * width) < min_area:
            continue
        ys, xs = [y for y, _ in part], [x for _, x in part]
        rows, columns = range(min(ys), max(ys) + 1), range(min(xs), max(xs) + 1)
        weight = sum(cells[y][x] for y in rows for x in columns) / (len(rows) * len(columns))
        up, side = expand * len(rows), expand * len(columns)
        box = [
            max((rows.start - up) / height, 0.0),
            max((columns.start - side) / width, 0.0),
            min((rows.stop + up) / height, 1.0),
            min((columns.stop + side) / width, 1.0),
        ]
        found.append((weight, box))
    found = sorted(found, reverse=True)[:k] or [(1.0, WHOLE)]
    found += [(0.0, WHOLE)] * (k - len(found))
    return [box for _, box in found], [weight for weight, _ in found]


@pytest.mark.parametrize("size", [None, (24, 33)])
@pytest.mark.parametrize(("k", "expand"), [(1, 0.0), (3, 0.2), (8, 0.0)])
@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.999])
def test_regions_are_those_of_a_loop_over_cells(
    size: tuple[int, int] | None, k: int, expand: float, threshold: float
) -> None:
    maps = torch.rand(30, 7, 9, generator=generator(0))
    boxes, weights = regions_from_maps(maps, k, threshold, 0.02, expand, size)
    expected = [looped(heatmap, k, threshold, 0.02, expand, size) for heatmap in maps]
    torch.testing.assert_close(boxes, torch.tensor([row for row, _ in expected]))
    torch.testing.assert_close(weights, torch.tensor([row for _, row in expected]))
    assert bool((weights.diff(dim=1) <= 0).all())


def test_any_maps_give_regions_that_a_table_takes(device: str) -> None:
    maps = torch.rand(60, 6, 6, generator=generator(1)) ** torch.arange(1, 61)[:, None, None]
    boxes, weights = regions_from_maps(maps.half().to(on(device)), 4, 0.0, 0.0, 0.3, (13, 17))
    table = RegionTable(60, regions=4)
    table.update(torch.arange(60), boxes, weights)
    assert table.written.all()
    assert np.array_equal(table.boxes, boxes.cpu().numpy())
    assert np.array_equal(table.weights, weights.cpu().numpy())
    assert [part.shape for part in regions_from_maps(torch.zeros(0, 4, 4), 2, 0.1)] == [(0, 2, 4), (0, 2)]


def test_a_loader_cuts_the_views_of_a_sample_from_one_region_drawn_in_proportion_to_its_weight(
    small_index: SampleIndex,
) -> None:
    parts = [
        (slice(0, 4), slice(0, 4), 0.9),
        (slice(0, 4), slice(6, 10), 0.6),
        (slice(6, 10), slice(0, 10), 0.3),
    ]
    boxes, weights = regions_from_maps(blobs(*parts), k=4, threshold=0.1)
    table = RegionTable(len(small_index), regions=4)
    many = len(small_index)
    table.update(np.arange(many), boxes.expand(many, -1, -1), weights.expand(many, -1))
    view = View(size=8, crop="inside", scale=(0.2, 1.0))
    loader = ViewLoader(small_index, [view, view], 20, regions=table, device="cpu", seed=5)
    counts = np.zeros(4, np.int64)
    for epoch in range(20):
        loader.set_epoch(epoch)
        for batch in loader:
            choice = (batch.boxes[:, None] == boxes).all(2).int().argmax(1)
            assert torch.equal(batch.boxes, boxes[0, choice])
            assert torch.equal(batch.weights, weights[0, choice])
            counts += np.bincount(choice.numpy(), minlength=4)
            pixel = 1 / 40  # a box is cut at whole pixels; the smallest image has 40
            low, high = batch.boxes[:, None, :2] - pixel, batch.boxes[:, None, 2:] + pixel
            assert bool(((batch.crops[..., :2] >= low) & (batch.crops[..., 2:] <= high)).all())
    assert counts[3] == 0  # the empty slot
    assert counts.sum() == 20 * many
    expected = counts.sum() * np.array([0.9, 0.6, 0.3]) / 1.8
    assert stats.chisquare(counts[:3], expected).pvalue > 0.01
    assert stats.chisquare(counts[:3], np.full(3, counts.sum() / 3)).pvalue < 1e-6  # it could have failed


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"k": 0}, "Regions cannot be made"),
        ({"threshold": -0.1}, "Regions cannot be made"),
        ({"expand": -1.0}, "Regions cannot be made"),
        ({"maps": torch.zeros(2, 1, 4, 4)}, r"maps have shape \(2, 1, 4, 4\)"),
    ],
)
def test_settings_that_make_no_region_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        regions_from_maps(**{"maps": torch.zeros(1, 4, 4), "k": 1, "threshold": 0.1, **wrong})


# ---- crops


@pytest.mark.parametrize("cells", [7, 14])
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_along_cell_edges_scores_the_mean_of_its_cells(device: str, cells: int, flip: bool) -> None:
    maps = torch.rand(20, 20, 24, generator=generator(2))
    y, x = torch.arange(20) % (21 - cells), 7 * torch.arange(20) % (25 - cells)
    crops = torch.stack([y / 20, x / 24, (y + cells) / 20, (x + cells) / 24], 1)
    means = [m[i : i + cells, j : j + cells].mean() for m, i, j in zip(maps, y, x, strict=True)]
    maps, crops, flipped = maps.to(on(device)), crops.to(on(device)), torch.full((20,), flip).to(on(device))
    with without_waiting(device):
        scores = crop_saliency(maps, crops, flipped)
    torch.testing.assert_close(scores.cpu(), torch.stack(means), atol=1e-5, rtol=0)


def test_on_a_slope_any_crop_scores_the_value_at_its_centre() -> None:
    rows = (torch.arange(16) + 0.5) / 16
    maps = (0.3 * rows[:, None] + 0.7 * rows).expand(50, 16, 16)
    low = 0.04 + 0.4 * torch.rand(50, 2, generator=generator(3))
    crops = torch.cat([low, low + 0.1 + 0.4 * torch.rand(50, 2, generator=generator(4))], 1)
    centre = (crops[:, :2] + crops[:, 2:]) / 2
    expected = 0.3 * centre[:, 0] + 0.7 * centre[:, 1]
    scores = crop_saliency(maps, crops, torch.arange(50) % 2 == 0)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


# ---- weights


def test_an_infinite_temperature_gives_exactly_one_to_every_sample(device: str) -> None:
    for batch in (1, 3, 7, 1000):
        scores = torch.rand(batch, 2, generator=generator(batch)).to(on(device))
        weights = pair_weights(scores, math.inf)
        assert torch.equal(weights.cpu(), torch.ones(batch))


@pytest.mark.parametrize("temperature", [LOWEST_TEMPERATURE, 0.01, 0.1, 1.0, 100.0, math.inf])
@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0])
def test_weights_are_finite_with_mean_one_at_any_temperature(temperature: float, scale: float) -> None:
    weights = pair_weights(scale * torch.rand(64, 2, generator=generator(5)), temperature)
    assert weights.dtype == torch.float32
    assert bool(weights.isfinite().all())
    assert weights.double().mean().item() == pytest.approx(1, abs=1e-6)


def test_known_scores_have_known_weights(device: str) -> None:
    scores = torch.tensor([[1.0, 0.5], [0.5, 0.5], [0.0, 1.0]], requires_grad=True)
    there = scores.to(on(device))
    with without_waiting(device):
        weights = pair_weights(there, 0.25)
    e = [math.exp(2), math.exp(1), math.exp(0)]  # of 0.5, 0.25 and 0
    torch.testing.assert_close(weights.cpu(), torch.tensor([3 * part / sum(e) for part in e]))
    assert not weights.requires_grad
    assert torch.equal(pair_weights(there.prod(1), 0.25), weights)


def test_scores_a_rounding_error_outside_the_unit_interval_do_no_harm() -> None:
    weights = pair_weights(torch.tensor([1 + 1e-6, 1.0, -1e-6, 0.0]), LOWEST_TEMPERATURE)
    torch.testing.assert_close(weights, torch.tensor([2.0, 2, 0, 0]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, LOWEST_TEMPERATURE / 2, math.nan])
def test_a_temperature_without_meaning_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"give at least 0\.002"):
        pair_weights(torch.rand(4, 2), temperature)
    with pytest.raises(ValueError, match=r"scores have shape \(4, 2, 1\)"):
        pair_weights(torch.rand(4, 2, 1), 1.0)


@pytest.mark.parametrize("temperature", [LOWEST_TEMPERATURE, 0.1, math.inf])
def test_two_ranks_weigh_their_samples_as_one_with_the_joined_batch(temperature: float) -> None:
    scores = torch.rand(12, 2, generator=generator(6))
    scores[:6] *= 0.1  # rank 0 has no crop like those of rank 1
    averages: list[Tensor] = []
    for part in scores.split(6):
        pair_weights(part, temperature, lambda x: averages.append(x) or x)
    ranks = [pair_weights(part, temperature, lambda x: sum(averages) / 2) for part in scores.split(6)]
    torch.testing.assert_close(torch.cat(ranks), pair_weights(scores, temperature))


# ---- gradient maps


def looped_map(features: Tensor, gradients: Tensor) -> list[list[list[float]]]:
    """ContraCAM's map from its formula, number by number."""
    maps = []
    for planes, slopes in zip(features.tolist(), gradients.tolist(), strict=True):
        rows, columns = range(len(planes[0])), range(len(planes[0][0]))
        alphas = [max(sum(map(sum, slope)) / (len(rows) * len(columns)), 0.0) for slope in slopes]
        weighted = list(zip(alphas, planes, strict=True))
        cam = [[max(sum(a * plane[y][x] for a, plane in weighted), 0.0) for x in columns] for y in rows]
        low, high = min(map(min, cam)), max(map(max, cam))
        maps.append([[(value - low) / (high - low) if high > low else 1.0 for value in row] for row in cam])
    return maps


def test_a_gradient_map_is_that_of_a_loop_in_double_precision(device: str) -> None:
    features = torch.randn(20, 6, 4, 5, generator=generator(7)).double()
    gradients = torch.randn(20, 6, 4, 5, generator=generator(8)).double()
    gradients[3] = -gradients[3].abs()  # no channel raises the score
    there = features.float().to(on(device)), gradients.float().to(on(device))
    with without_waiting(device):
        maps = gradient_map(*there)
    expected = torch.tensor(looped_map(features, gradients))
    torch.testing.assert_close(maps.cpu(), expected, atol=1e-5, rtol=0)
    assert bool((maps[3] == 1).all())


def test_a_gradient_map_of_half_precision_loses_nothing_and_does_not_depend_on_the_loss_scale() -> None:
    features = torch.rand(4, 8, 3, 3, generator=generator(9)).half()
    # Near the least number that half precision holds.
    gradients = (1e-6 * torch.randn(4, 8, 3, 3, generator=generator(10))).half()
    maps = gradient_map(features, gradients)
    assert torch.equal(maps, gradient_map(features.float(), gradients.float()))
    torch.testing.assert_close(gradient_map(features, gradients * 1024), maps, atol=1e-6, rtol=0)


def test_the_gradient_of_a_score_finds_the_object_that_the_activation_sum_misses() -> None:
    head = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, -1.0]]))
    features = torch.zeros(1, 2, 4, 4)
    features[0, 0, 1, 1] = 1.0  # the object, seen by the channel that raises the score
    features[0, 1, 3, 3] = 9.0  # something louder that lowers it
    features.requires_grad_()
    score = head(features.mean((2, 3))).sum()
    (gradients,) = torch.autograd.grad(score, features)
    maps = gradient_map(features, gradients)
    assert not maps.requires_grad
    assert maps.nonzero().tolist() == [[0, 1, 1]]
    assert int(activation_map(features).argmax()) == 4 * 3 + 3


def test_features_and_gradients_of_unequal_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="do not match"):
        gradient_map(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5))
    with pytest.raises(ValueError, match="do not match"):
        gradient_map(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
