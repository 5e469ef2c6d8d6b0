"""Every pixel of every view lies where the batch says it does, through the real DALI graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import digest

from dali_views import RegionTable, SampleIndex, View, ViewLoader

# With these the loader hands out raw 0 ... 255 values.
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
SIZES = [(200, 256), (256, 131), (97, 97), (64, 250)]


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


def expected_positions(crop: torch.Tensor, flipped: bool, height: int, width: int, size: int) -> tuple:
    """Row and column of the source pixel under each pixel centre of a view, from its rectangle alone."""
    y0, x0, y1, x1 = (crop.double() * torch.tensor([height, width, height, width])).tolist()
    steps = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    rows, columns = y0 + steps * (y1 - y0) - 0.5, x0 + steps * (x1 - x0) - 0.5
    return rows, columns.flip(0) if flipped else columns


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
        for v, pixels in enumerate(batch.views):
            for b in range(len(batch)):
                height, width = position_images.sizes[int(batch.index[b])]
                flipped = bool(batch.flipped[b, v])
                seen_flips.add(flipped)
                y, x = expected_positions(batch.crops[b, v].cpu(), flipped, height, width, size)
                image = pixels[b].double().cpu()
                assert (image[2] == float(batch.index[b])).all()
                # A pixel whose filter reaches beyond the image sees its edge only, which is not a question
                # of where the view lies.
                reach = (1 if interpolation == "linear" else 2) * max(1.0, height / size, width / size)
                inner_y = (y > reach) & (y < height - 1 - reach)
                inner_x = (x > reach) & (x < width - 1 - reach)
                error_y = (image[0] - y[:, None])[inner_y].abs()
                error_x = (image[1] - x[None, :])[:, inner_x].abs()
                assert error_y.numel() == 0 or error_y.max() <= 0.51  # half a pixel, and rounding to uint8
                assert error_x.numel() == 0 or error_x.max() <= 0.51
                assert (image[0] - y.clamp(0, height - 1)[:, None]).abs().max() <= reach
    assert seen_flips == ({False} if flip == 0.0 else {False, True})


def test_partner_views_are_cut_from_the_partner_with_the_partners_own_box(position_images, device):
    n = len(position_images)
    regions = RegionTable(n)
    partner = (np.arange(n) + 3) % n
    boxes = np.tile(np.array([0.0, 0.0, 0.4, 0.4], np.float32), (n, 1))
    boxes[1::2] = [0.5, 0.5, 1.0, 1.0]
    regions.update(np.arange(n), boxes, partner=partner)
    views = [View(size=40, crop="inside"), View(size=40, crop="inside", source="partner")]
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
