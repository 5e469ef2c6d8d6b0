"""View <-> image coordinates of boxes and maps, and the overlap of boxes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dali_views.maps.coordinates import boxes_to_image, boxes_to_view, iou, map_to_image, map_to_view

WHOLE = [0.0, 0.0, 1.0, 1.0]


def random_boxes(n: int, seed: int, least: float = 0.02) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    size = least + (1 - least) * torch.rand(n, 2, generator=g)
    origin = (1 - size) * torch.rand(n, 2, generator=g)
    return torch.cat([origin, origin + size], 1)


def flips(n: int) -> Tensor:
    return torch.arange(n) % 2 == 1


def angles(n: int) -> Tensor:
    return torch.arange(n).div(2, rounding_mode="floor").remainder(4).byte()


def test_known_boxes_land_where_they_should() -> None:
    crop = torch.tensor([[0.5, 0.0, 1.0, 0.5]]).repeat(2, 1)
    box = torch.tensor([[0.5, 0.25, 0.75, 0.5]]).repeat(2, 1)
    assert boxes_to_view(box, crop, flips(2)).tolist() == [[0, 0.5, 0.5, 1], [0, 0, 0.5, 0.5]]


def test_boxes_survive_the_round_trip_for_any_crop_and_flip() -> None:
    boxes, crops = random_boxes(500, 3), random_boxes(500, 4)
    there = boxes_to_view(boxes, crops, flips(500))
    assert bool((there[:, 2:] > there[:, :2]).all())
    torch.testing.assert_close(boxes_to_image(there, crops, flips(500)), boxes, atol=1e-6, rtol=0)


def test_boxes_go_with_the_pixels_of_a_flipped_and_rotated_view_and_back() -> None:
    """A box of whole cells of an image that is its own view is the rectangle of its pixels."""
    image = torch.zeros(8, 6, 5)
    image[:, 1:3, 3:4] = 1.0
    whole, box = torch.tensor([WHOLE]).repeat(8, 1), torch.tensor([[1 / 6, 3 / 5, 3 / 6, 4 / 5]]).repeat(8, 1)
    place = whole, flips(8), False, angles(8)
    found = boxes_to_view(box, *place)
    for pixels, mirror, angle, one in zip(image, flips(8), angles(8), found, strict=True):
        seen = torch.rot90(pixels.flip(1) if mirror else pixels, int(angle))
        rows, columns = (seen.amax(axis).nonzero().flatten().tolist() for axis in (1, 0))
        height, width = seen.shape
        edges = [rows[0] / height, columns[0] / width, (rows[-1] + 1) / height, (columns[-1] + 1) / width]
        assert one.tolist() == pytest.approx(edges)
    crops = random_boxes(8, 8)
    place = crops, flips(8), False, angles(8)
    torch.testing.assert_close(boxes_to_image(boxes_to_view(box, *place), *place), box, atol=1e-6, rtol=0)


def test_maps_go_with_the_pixels_of_a_flipped_and_rotated_view_and_back() -> None:
    maps, crops = torch.rand(8, 12, 10), torch.tensor([[0.25, 0.2, 0.75, 0.8]]).repeat(8, 1)
    for number, angle in enumerate(angles(8).tolist()):
        rows = slice(number, number + 1)
        place = crops[rows], flips(8)[rows]
        cut = maps[rows, 3:9, 2:8]
        seen = torch.rot90(cut.flip(2) if place[1] else cut, angle, (1, 2))
        view = map_to_view(maps[rows], *place, (6, 6), angles(8)[rows])
        torch.testing.assert_close(view, seen, atol=1e-5, rtol=0)
        back, covered = map_to_image(view, *place, (12, 10), angles(8)[rows])
        assert covered.sum() == 36
        torch.testing.assert_close(back[:, 3:9, 2:8], cut, atol=1e-5, rtol=0)


def test_clipping_cuts_boxes_to_the_view() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.6, 0.6, 0.9, 0.9]])
    crops = torch.tensor([[0.25, 0.25, 0.5, 0.5]]).repeat(2, 1)
    clipped = boxes_to_view(boxes, crops, flips(2), clip=True)
    assert clipped[0].tolist() == WHOLE
    assert float((clipped[1, 2:] - clipped[1, :2]).prod()) == 0
    assert float(boxes_to_view(boxes, crops, flips(2)).max()) > 1
    beyond = torch.tensor([[-9.0, -9, 9, 9]])
    assert boxes_to_image(beyond, crops[:1], flips(1), clip=True).tolist() == [WHOLE]


def ramps(n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Maps whose cells hold their own centre's y, and x."""
    y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    return y[:, None].expand(n, height, width), x.expand(n, height, width)


def test_a_view_of_a_position_ramp_holds_image_positions_for_any_crop_and_flip() -> None:
    n, (height, width), (h, w) = 200, (20, 30), (9, 7)
    crops, flipped = random_boxes(n, 5), flips(n)
    y0, x0, y1, x1 = crops[:, :, None, None].unbind(1)
    v, u = ramps(n, h, w)
    u = torch.where(flipped[:, None, None], 1 - u, u)
    y = (y0 + v * (y1 - y0)).clamp(0.5 / height, 1 - 0.5 / height)  # border cells hold
    x = (x0 + u * (x1 - x0)).clamp(0.5 / width, 1 - 0.5 / width)
    for ramp, expected in zip(ramps(n, height, width), (y, x), strict=True):
        torch.testing.assert_close(map_to_view(ramp, crops, flipped, (h, w)), expected, atol=1e-5, rtol=0)


def test_a_view_ramp_placed_in_the_image_holds_view_positions_where_covered_and_zero_elsewhere() -> None:
    n, (height, width), (h, w) = 200, (20, 30), (9, 7)
    crops, flipped = random_boxes(n, 6), flips(n)
    y0, x0, y1, x1 = crops[:, :, None, None].unbind(1)
    y, x = ramps(n, height, width)
    inside = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
    u = (x - x0) / (x1 - x0)
    u = torch.where(flipped[:, None, None], 1 - u, u).clamp(0.5 / w, 1 - 0.5 / w)
    v = ((y - y0) / (y1 - y0)).clamp(0.5 / h, 1 - 0.5 / h)
    for ramp, expected in zip(ramps(n, h, w), (v, u), strict=True):
        maps, covered = map_to_image(ramp, crops, flipped, (height, width))
        assert torch.equal(covered, inside)
        torch.testing.assert_close(maps, torch.where(inside, expected, 0), atol=1e-5, rtol=0)


def test_coordinates_of_mismatched_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="take one view"):
        boxes_to_view(torch.zeros(2, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"maps have shape \(2, 1, 4, 4\)"):
        map_to_view(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4), torch.zeros(2), (4, 4))


def test_iou_of_known_pairs() -> None:
    a = torch.tensor([[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0, 0, 0.5, 1], [0.2, 0.2, 0.2, 0.2], [0, 0, 0.2, 0.2]])
    b = torch.tensor(
        [[0, 0, 1, 1], [0.5, 0.5, 1, 1], [0.25, 0, 1, 1], [0.2, 0.2, 0.2, 0.2], [0.5, 0.5, 1, 1]]
    )
    torch.testing.assert_close(iou(a, b), torch.tensor([1, 0, 0.25, 0, 0]))
