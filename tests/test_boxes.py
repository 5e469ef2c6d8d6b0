"""From heatmaps to boxes, the saliency of crops, and weights of losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import on, without_waiting
from torch import Tensor
from torch.nn import functional as F

from dali_views import RegionTable, SampleIndex, View, ViewLoader
from dali_views.maps import boxes as readings
from dali_views.maps.boxes import boxes_from_maps, regions_from_maps, thresholds
from dali_views.maps.coordinates import map_to_view
from dali_views.maps.heatmap import activation_map
from dali_views.maps.loss_weights import LOWEST_TEMPERATURE, crop_saliency, pair_weights

WHOLE = [0.0, 0.0, 1.0, 1.0]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(*parts: tuple[slice, slice, float], size: int = 10) -> Tensor:
    """One map (1, size, size) of rectangles of constant value on 0."""
    maps = torch.zeros(1, size, size)
    for y, x, value in parts:
        maps[0, y, x] = value
    return maps


LEFT = (slice(1, 4), slice(0, 2), 0.5)  # 3 x 2 cells
RIGHT = (slice(6, 10), slice(5, 9), 0.8)  # 4 x 4 cells


# ---- boxes


def published_box(heatmap: Tensor, k: float, size: tuple[int, int]) -> list[float]:
    """update_box of the authors' code for one image, with +1 on the last indices."""
    up = F.interpolate(heatmap[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    rows = [i for i in range(size[0]) if max(up[i].tolist()) > k]
    columns = [j for j in range(size[1]) if max(up[:, j].tolist()) > k]
    if not rows:
        return WHOLE
    return [rows[0] / size[0], columns[0] / size[1], (rows[-1] + 1) / size[0], (columns[-1] + 1) / size[1]]


@pytest.mark.parametrize(("cells", "size"), [((7, 7), (56, 56)), ((4, 4), (32, 32)), ((3, 5), (24, 33))])
@pytest.mark.parametrize("k", [0.1, 0.5, 0.95])
def test_boxes_follow_the_published_rule(cells: tuple[int, int], size: tuple[int, int], k: float) -> None:
    sparse = torch.rand(40, 6, *cells, generator=torch.Generator().manual_seed(2)) ** 9
    maps = activation_map(torch.where(sparse > 0.5, sparse, 0))
    expected = torch.tensor([published_box(m, k, size) for m in maps])
    assert len(set(map(tuple, expected.tolist()))) > 5
    torch.testing.assert_close(boxes_from_maps(maps, k, size), expected)


def looped_otsu(values: list[float]) -> float:
    """The value at or below which a cut leaves the greatest variance between its two sides."""
    best, level = -1.0, 0.0
    for cut in sorted(set(values))[:-1]:
        low, high = [v for v in values if v <= cut], [v for v in values if v > cut]
        gap = sum(high) / len(high) - sum(low) / len(low)
        if (between := len(low) * len(high) * gap**2) > best:
            best, level = between, cut
    return level


def test_otsus_level_is_that_of_a_loop_and_follows_a_high_floor() -> None:
    maps = torch.rand(20, 4, 5, generator=torch.Generator().manual_seed(4)).mul(8).round().div(8)
    levels = thresholds(maps, "otsu").flatten()
    expected = [looped_otsu(values) for values in maps.flatten(1).tolist()]
    torch.testing.assert_close(levels, torch.tensor(expected))
    floor = torch.full((1, 6, 6), 0.8)
    floor[0, 1:3, 2:5] = 1.0
    assert boxes_from_maps(floor, 0.1).tolist() == [WHOLE]
    torch.testing.assert_close(boxes_from_maps(floor, "otsu"), torch.tensor([[1 / 6, 2 / 6, 3 / 6, 5 / 6]]))
    assert boxes_from_maps(torch.full((2, 4, 4), 0.3), threshold=0.3).tolist() == [WHOLE] * 2


# ---- readings


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_a_part_is_the_connected_one_of_greatest_sum(threshold: float, device: str) -> None:
    maps = torch.rand(40, 7, 9, generator=generator(7))
    expected = []
    for cells in maps.tolist():
        heaviest = max(parts(cells, threshold), key=lambda part: sum(cells[y][x] for y, x in part))
        rows, columns = tight(heaviest)
        expected.append([rows.start / 7, columns.start / 9, rows.stop / 7, columns.stop / 9])
    found = boxes_from_maps(maps.to(on(device)), threshold, reading="part")
    assert found.device.type == on(device).type
    torch.testing.assert_close(found.cpu(), torch.tensor(expected))
    assert boxes_from_maps(maps, 1.0, reading="part").tolist() == [WHOLE] * 40


def test_a_part_and_a_rectangle_leave_out_a_small_second_spot_that_the_extent_includes() -> None:
    maps = blobs((slice(2, 8), slice(4, 9), 1.0), (slice(0, 1), slice(0, 1), 1.0))
    body = torch.tensor([[0.2, 0.4, 0.8, 0.9]])
    torch.testing.assert_close(boxes_from_maps(maps, 0.5), torch.tensor([[0, 0, 0.8, 0.9]]))
    torch.testing.assert_close(boxes_from_maps(maps, 0.5, reading="part"), body)
    torch.testing.assert_close(boxes_from_maps(maps, reading="rectangle"), body)


def looped_rectangle(cells: list[list[float]]) -> list[float]:
    """The rectangle that is higher than the rest and leaves the greatest variance between the two."""
    height, width = len(cells), len(cells[0])
    best, box = -1.0, WHOLE
    for y0, y1 in itertools.combinations(range(height + 1), 2):
        for x0, x1 in itertools.combinations(range(width + 1), 2):
            inside = [cells[y][x] for y in range(y0, y1) for x in range(x0, x1)]
            n, rest = len(inside), height * width - len(inside)
            if not rest:
                continue
            gap = sum(inside) / n - (sum(map(sum, cells)) - sum(inside)) / rest
            if gap > 0 and (between := n * rest * gap**2) > best:
                best, box = between, [y0 / height, x0 / width, y1 / height, x1 / width]
    return box


def test_a_rectangle_is_that_of_a_loop_over_all_rectangles(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings, "_AT_A_TIME", 7 * 21 * 15)  # several parts of the batch
    maps = torch.rand(20, 6, 5, generator=generator(8)) ** 2
    expected = torch.tensor([looped_rectangle(cells) for cells in maps.tolist()])
    assert len(expected.unique(dim=0)) > 10
    with without_waiting(device):
        found = boxes_from_maps(maps.to(on(device)), reading="rectangle")
    torch.testing.assert_close(found.cpu(), expected)
    # Neither the range nor the floor of a map matters, unlike with a threshold.
    torch.testing.assert_close(boxes_from_maps(0.2 * maps + 0.7, reading="rectangle"), expected)
    assert boxes_from_maps(torch.full((2, 6, 5), 0.3), reading="rectangle").tolist() == [WHOLE] * 2
    assert boxes_from_maps(torch.zeros(0, 6, 5), reading="rectangle").shape == (0, 4)


def test_rectangles_of_a_large_map_are_those_of_its_sixteenths() -> None:
    maps = blobs((slice(24, 64), slice(8, 32), 0.6), size=128) + 0.1 * torch.rand(5, 128, 128)
    expected = torch.tensor([[24 / 128, 8 / 128, 64 / 128, 32 / 128]]).expand(5, -1)
    torch.testing.assert_close(boxes_from_maps(maps, reading="rectangle"), expected)


# ---- regions


def test_two_blobs_are_two_regions_the_more_salient_one_first_and_the_third_slot_stays_empty(
    device: str,
) -> None:
    boxes, weights = regions_from_maps(blobs(LEFT, RIGHT).to(on(device)), k=3, threshold=0.1)
    assert boxes.device.type == weights.device.type == on(device).type
    assert (boxes.dtype, weights.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(boxes.cpu(), torch.tensor([[[0.6, 0.5, 1, 0.9], [0.1, 0, 0.4, 0.2], WHOLE]]))
    torch.testing.assert_close(weights.cpu(), torch.tensor([[0.8, 0.5, 0]]))


def parts(cells: list[list[float]], threshold: float) -> Iterator[set[tuple[int, int]]]:
    """The connected parts above the threshold, cell by cell, from top to bottom."""
    left = {(y, x) for y, row in enumerate(cells) for x, value in enumerate(row) if value > threshold}
    while left:
        part, edge = set(), [min(left)]
        while edge:
            y, x = edge.pop()
            if (y, x) in left:
                left.remove((y, x))
                part.add((y, x))
                edge += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        yield part


def tight(part: set[tuple[int, int]]) -> tuple[range, range]:
    """Rows and columns of a part."""
    ys, xs = [y for y, _ in part], [x for _, x in part]
    return range(min(ys), max(ys) + 1), range(min(xs), max(xs) + 1)


def looped(
    heatmap: Tensor, k: int, threshold: float, min_area: float, size: tuple[int, int] | None
) -> tuple[list[list[float]], list[float]]:
    """Boxes and weights of one map (h, w), cell by cell."""
    if size is not None:
        heatmap = F.interpolate(heatmap[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    cells = heatmap.tolist()
    height, width = len(cells), len(cells[0])
    found = []
    for part in parts(cells, threshold):
        if len(part) / (height * width) < min_area:
            continue
        rows, columns = tight(part)
        weight = sum(cells[y][x] for y in rows for x in columns) / (len(rows) * len(columns))
        box = [rows.start / height, columns.start / width, rows.stop / height, columns.stop / width]
        found.append((weight, box))
    found = sorted(found, reverse=True)[:k] or [(1.0, WHOLE)]
    found += [(0.0, WHOLE)] * (k - len(found))
    return [box for _, box in found], [weight for weight, _ in found]


@pytest.mark.parametrize("size", [None, (24, 33)])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.999])
def test_regions_are_those_of_a_loop_over_cells(
    size: tuple[int, int] | None, k: int, threshold: float
) -> None:
    maps = torch.rand(30, 7, 9, generator=generator(0))
    boxes, weights = regions_from_maps(maps, k, threshold, 0.02, size)
    expected = [looped(heatmap, k, threshold, 0.02, size) for heatmap in maps]
    torch.testing.assert_close(boxes, torch.tensor([row for row, _ in expected]))
    torch.testing.assert_close(weights, torch.tensor([row for _, row in expected]))
    assert bool((weights.diff(dim=1) <= 0).all())


def test_any_maps_give_regions_that_a_table_takes(device: str) -> None:
    maps = torch.rand(60, 6, 6, generator=generator(1)) ** torch.arange(1, 61)[:, None, None]
    boxes, weights = regions_from_maps(maps.half().to(on(device)), 4, 0.0, 0.0, (13, 17))
    table = RegionTable(60, regions=4)
    table.update(torch.arange(60), boxes, weights)
    assert table.written.all()
    assert np.array_equal(table.boxes, boxes.cpu().numpy())
    assert np.array_equal(table.weights, weights.cpu().numpy())
    assert [part.shape for part in regions_from_maps(torch.zeros(0, 4, 4), 2, 0.1)] == [(0, 2, 4), (0, 2)]


def test_a_loader_cuts_all_views_of_a_sample_from_one_of_its_regions(small_index: SampleIndex) -> None:
    boxes, weights = regions_from_maps(blobs(LEFT, RIGHT), k=3, threshold=0.1)
    many = len(small_index)
    table = RegionTable(many, regions=3)
    table.update(range(many), boxes.expand(many, -1, -1), weights.expand(many, -1))
    view = View(size=8, crop="inside")
    chosen = set()
    for batch in ViewLoader(small_index, [view, view], 20, regions=table, device="cpu"):
        choice = (batch.boxes[:, None] == boxes).all(2).int().argmax(1)
        assert torch.equal(batch.boxes, boxes[0, choice])
        assert torch.equal(batch.weights, weights[0, choice])
        chosen |= set(choice.tolist())
        pixel = 1 / 40  # a box is cut at whole pixels; the smallest image has 40
        low, high = batch.boxes[:, None, :2] - pixel, batch.boxes[:, None, 2:] + pixel
        assert bool(((batch.crops[..., :2] >= low) & (batch.crops[..., 2:] <= high)).all())
    assert chosen == {0, 1}  # never the empty slot


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"k": 0}, "Regions cannot be made"),
        ({"threshold": -0.1}, "Regions cannot be made"),
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
    rotated = map_to_view(maps, crops, flipped, (7, 7), torch.arange(20).to(on(device)) % 4).mean((1, 2))
    torch.testing.assert_close(scores, rotated, atol=1e-5, rtol=0)


# ---- weights


@pytest.mark.parametrize("temperature", [LOWEST_TEMPERATURE, 0.01, 0.1, 1.0, 100.0, math.inf])
@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0])
def test_weights_are_finite_with_mean_one_at_any_temperature(temperature: float, scale: float) -> None:
    weights = pair_weights(scale * torch.rand(64, 2, generator=generator(5)), temperature)
    assert weights.dtype == torch.float32
    assert bool(weights.isfinite().all())
    assert weights.double().mean().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(weights, torch.ones(64)) or temperature < math.inf


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
