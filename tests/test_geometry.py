"""Every pixel of every view lies where the batch says it does, through the real DALI graph."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import digest

from dali_views import Batch, RegionTable, SampleIndex, View, ViewLoader
from dali_views.graph import feed, views_cpu
from dali_views.maps.coordinates import map_to_image, map_to_view
from dali_views.plan.views import complete

# With these the loader hands out raw 0 ... 255 values.
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
SIZES = [(200, 256), (256, 131), (97, 97), (64, 250)]
COLOUR = {"jitter": 0.5, "brightness": 0.4, "hue": 0.1, "grayscale": 0.2, "blur": 0.5, "solarise": 0.2}


@pytest.fixture(params=["cpu", "operators on the cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The one pass of the CPU, and the GPU's operators on both devices."""
    if request.param == "operators on the cpu":
        monkeypatch.setattr(feed, "Views", lambda *_, **__: None)
    return str(request.param).split()[-1]


@pytest.fixture(scope="module")
def position_images(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    """Lossless images whose red is the row and whose green is the column of the pixel."""
    folder = tmp_path_factory.mktemp("positions")
    for number, (height, width) in enumerate(SIZES * 4):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[..., 0] = np.arange(height)[:, None]
        pixels[..., 1] = np.arange(width)[None, :]
        pixels[..., 2] = number
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return SampleIndex.from_folder(folder, cache=False, progress=False)


def expected_positions(batch: Batch, b: int, v: int, height: int, width: int) -> torch.Tensor:
    """(2, S, S) row and column of the source pixel under each pixel centre of a view, as its batch says."""
    size = batch.views[v].shape[2]
    y0, x0, y1, x1 = (batch.crops[b, v].cpu().double() * torch.tensor([height, width] * 2)).tolist()
    steps = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    upright = torch.meshgrid(y0 + steps * (y1 - y0) - 0.5, x0 + steps * (x1 - x0) - 0.5, indexing="ij")
    places = torch.stack(upright)
    places = places.flip(2) if batch.flipped[b, v] else places
    return torch.rot90(places, int(batch.rotated[b, v]), (1, 2))


def check_positions(index: SampleIndex, batch: Batch, v: int, interpolation: str) -> None:
    """Each pixel of view `v` is the pixel of its image that crops, `flipped` and `rotated` say."""
    size = batch.views[v].shape[2]
    for b in range(len(batch)):
        height, width = index.sizes[int(batch.index[b])]
        places, image = expected_positions(batch, b, v, height, width), batch.views[v][b].double().cpu()
        assert (image[2] == float(batch.index[b])).all()
        # A pixel whose filter reaches beyond the image (the one pass of the CPU cuts first: beyond the crop)
        # sees its edge only, which is not a question of where the view lies.
        edges = torch.tensor([0, 0, height, width]).double()
        crop = batch.crops[b, v].cpu().double() * torch.tensor([height, width] * 2)
        edges = crop.round() if cuts_first(batch) else edges
        reach = (1 if interpolation == "linear" else 2) * max(1.0, (crop[2:] - crop[:2]).max().item() / size)
        for seen, place, low, high in zip(image[:2], places, edges[:2], edges[2:], strict=True):
            inner = (place > low + reach) & (place < high - 1 - reach)
            error = (seen - place)[inner].abs()
            assert error.numel() == 0 or error.max() <= 0.51  # half a pixel, and rounding to uint8
            assert (seen - place.clamp(low, high - 1)).abs().max() <= reach


def cuts_first(batch: Batch) -> bool:
    return batch.views[0].device.type == "cpu" and feed.Views is views_cpu.Views


@pytest.mark.parametrize("crop", ["random", "contrastive", "inside", "whole", "centre"])
@pytest.mark.parametrize("size", [32, 77, 160])
@pytest.mark.parametrize("flip", [0.0, 0.5])
@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_every_pixel_lies_where_crops_and_flipped_say(
    position_images, device, crop, size, flip, interpolation
):
    regions = RegionTable(len(position_images))
    rows = np.arange(len(position_images))
    regions.update(rows, np.tile(np.array([0.3, 0.2, 0.9, 0.6], np.float32), (len(rows), 1)))
    view = View(size=size, crop=crop, flip=flip, interpolation=interpolation)
    loader = ViewLoader(position_images, [view, view], 8, regions=regions, device=device, **RAW)
    seen_flips = set()
    for batch in loader:
        sides = torch.from_numpy(position_images.sizes[batch.index.cpu().numpy()]).double().repeat(1, 2)
        corners = batch.crops.cpu().double() * sides[:, None]
        assert (corners - corners.round()).abs().max() < 1e-3  # whole pixels, inside the image
        assert batch.crops.min() >= 0
        assert batch.crops.max() <= 1
        assert not batch.rotated.any()
        seen_flips |= set(batch.flipped.flatten().tolist())
        for v in range(2):
            check_positions(position_images, batch, v, interpolation)
    assert seen_flips == ({False} if flip == 0.0 else {False, True})


@pytest.mark.parametrize("colour", [{}, {"grayscale": 1e-9}])  # without and with the compiled function
@pytest.mark.parametrize("size", [32, 77])
@pytest.mark.parametrize(
    ("chances", "orientations"),
    [
        ({"vflip": 1.0}, [(True, 2)]),
        ({"flip": 1.0, "vflip": 1.0}, [(False, 2)]),
        ({"rotate90": 1.0}, [(False, 1), (False, 2), (False, 3)]),
        ({"flip": 0.5, "vflip": 0.5, "rotate90": 0.75}, list(product((False, True), range(4)))),
    ],
)
def test_every_pixel_lies_where_flips_and_rotations_say(
    position_images, device, chances, orientations, size, colour
):
    view = View(size=size, **chances, **colour)
    loader = ViewLoader(position_images, [view] * 4, 8, device=device, **RAW)
    seen = set()
    for batch in loader:
        seen |= set(zip(batch.flipped.flatten().tolist(), batch.rotated.flatten().tolist(), strict=True))
        for v in range(4):
            check_positions(position_images, batch, v, "linear")
    assert seen == set(orientations)


def test_maps_of_flipped_and_rotated_views_are_put_back_where_their_pixels_lie(position_images, device):
    view = View(size=160, scale=(0.3, 1.0), flip=0.5, vflip=0.5, rotate90=0.75)
    for batch in ViewLoader(position_images, [view], 4, device=device, **RAW):
        place = batch.crops[:, 0], batch.flipped[:, 0], batch.rotated[:, 0]
        sides = torch.from_numpy(position_images.sizes[batch.index.cpu().numpy()])
        for axis in (0, 1):
            placed, covered = map_to_image(batch.views[0][:, axis], *place[:2], (24, 20), place[2])
            centres = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in (24, 20)), indexing="ij")[axis]
            expected = sides[:, axis, None, None] * centres - 0.5
            assert covered.any((1, 2)).all()
            # A cell beside the border of the crop holds the border's value.
            reach = 0.51 + sides.max() / 160
            assert (placed.cpu() - expected)[covered.cpu()].abs().max() < reach
            again = map_to_view(expected.to(placed), *place[:2], (9, 9), place[2])
            small = torch.nn.functional.interpolate(batch.views[0][:, axis : axis + 1], size=9, mode="area")
            assert (again - small[:, 0])[:, 1:-1, 1:-1].abs().max() < sides.max() / 24


def test_a_view_inside_another_one_never_leaves_it(position_images, device):
    outer = View(size=64, scale=(0.1, 0.3), flip=0.5, rotate90=0.5)
    inner = View(size=48, scale=(0.2, 1.0), within=0, vflip=0.5, rotate90=0.5)
    views = [outer, inner, replace(inner, within=1, scale=(0.5, 1.0)), View(size=32, crop="whole", within=1)]
    for batch in ViewLoader(position_images, views, 8, device=device, **RAW):
        sides = position_images.sizes[batch.index.cpu().numpy()].astype(np.float64)
        corners = batch.crops.cpu().numpy() * np.tile(sides, 2)[:, None]
        pixels = corners.round().astype(int)
        assert np.abs(corners - pixels).max() < 1e-3
        for within, v in ((0, 1), (1, 2)):
            assert (pixels[:, v, :2] >= pixels[:, within, :2]).all()
            assert (pixels[:, v, 2:] <= pixels[:, within, 2:]).all()
            assert (pixels[:, v] != pixels[:, within]).any()
        assert (pixels[:, 3] == pixels[:, 1]).all()
        for v in range(4):
            check_positions(position_images, batch, v, "linear")


def test_a_twin_is_its_view_without_colour(position_images, device):
    regions = RegionTable(len(position_images))
    rows = np.arange(len(position_images))
    regions.update(rows, np.tile(np.array([0.3, 0.2, 0.9, 0.6], np.float32), (len(rows), 1)))
    shape = View(
        size=48, crop="contrastive", joint=0.0, flip=0.5, vflip=0.5, rotate90=0.5, interpolation="cubic"
    )
    local = View(size=30, within=1, flip=0.5)
    views = [*[replace(shape, **COLOUR)] * 2, View(size=48, twin_of=1), View(size=20, twin_of=0)]
    views += [replace(local, **COLOUR), View(size=30, twin_of=4), View(size=24, twin_of=5)]
    loader, bare = (
        ViewLoader(position_images, each, 8, regions=regions, device=device, **RAW)
        for each in (views, [shape, shape, View(size=9), View(size=9), local])
    )
    alike = []
    for batch, other in zip(loader, bare, strict=True):
        for twin, view in ((2, 1), (3, 0), (5, 4), (6, 4)):
            for name in ("crops", "flipped", "rotated"):
                told = getattr(batch, name)
                assert torch.equal(told[:, twin], told[:, view])
            check_positions(position_images, batch, twin, "cubic" if twin < 4 else "linear")
        for twin, view in ((2, 1), (5, 4)):
            assert torch.equal(batch.views[twin], other.views[view])
            alike.append((batch.views[twin] - batch.views[view]).abs().amax((1, 2, 3)) < 0.01)
    assert 0.05 < torch.cat(alike).double().mean() < 0.6  # where no colour was drawn, a view is its twin
    assert complete(loader.views) == loader.views


def test_partner_views_are_cut_from_the_partner_with_the_partners_own_box(position_images, device):
    n = len(position_images)
    regions = RegionTable(n)
    partner = (np.arange(n) + 3) % n
    boxes = np.tile(np.array([0.0, 0.0, 0.4, 0.4], np.float32), (n, 1))
    boxes[1::2] = [0.5, 0.5, 1.0, 1.0]
    regions.update(np.arange(n), boxes, partner=partner)
    views = [View(size=40, crop="inside"), View(size=40, crop="inside", partner=True)]
    loader = ViewLoader(position_images, views, 8, regions=regions, device=device, **RAW)
    for batch in loader:
        assert np.array_equal(batch.partner.cpu().numpy(), partner[batch.index.cpu().numpy()])
        for b in range(len(batch)):
            own, other = int(batch.index[b]), int(batch.partner[b])
            assert (batch.views[0][b, 2] == own).all()
            assert (batch.views[1][b, 2] == other).all()
            low = batch.crops[b, 1, :2].min()
            assert low >= 0.48 if other % 2 else batch.crops[b, 1, 2:].max() <= 0.42


def test_arrays_and_files_of_the_same_pixels_give_the_same_views(tmp_path: Path, device):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number:02d}.png")
    full = View(
        size=24, flip=0.5, jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.5
    )
    indexes = SampleIndex.from_folder(tmp_path, cache=False, progress=False), SampleIndex.from_arrays(pixels)
    files, arrays = (
        [digest(batch) for batch in ViewLoader(index, [full, full], 4, device=device)] for index in indexes
    )
    assert files == arrays
