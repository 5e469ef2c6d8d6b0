"""Boxes and masks stay on their objects when the loader resizes, mirrors and pads whole images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_tools
from test_geometry import RAW

from dali_views import SampleIndex, View, ViewLoader
from dali_views.tools.scenes import run_lengths
from trainers.detect.targets import in_view, raster, targets_of, views_of
from trainers.detect.truth import Objects, Truth

SIZES = [(200, 256), (256, 131), (97, 97), (64, 250)]


@pytest.fixture(scope="module")
def objects_on_black(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """Images with two bright objects each: an ellipse, as run lengths, and a polygon."""
    folder, found = tmp_path_factory.mktemp("objects"), []
    for number, (height, width) in enumerate(SIZES * 4):
        y, x = np.mgrid[:height, :width] + 0.5
        ellipse = ((y / height - 0.3) / 0.2) ** 2 + ((x / width - 0.25) / 0.15) ** 2 < 1
        corners = np.array([[0.7, 0.5], [0.9, 0.5], [0.9, 0.9], [0.5, 0.9], [0.5, 0.7]]) * (width, height)
        low, high = corners.min(0), corners.max(0)
        square = (x > low[0]) & (x < high[0]) & (y > low[1]) & (y < high[1])
        polygon = square & (x / width + y / height > 1.2)  # a corner is cut off
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[ellipse, 0], pixels[polygon, 1], pixels[..., 2] = 255, 255, number
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        boxes = [box_of(ellipse), [*low, *high]]
        yes, no = np.ones(2, np.bool_), np.zeros(2, np.bool_)
        masks = [run_lengths(ellipse), [corners]]
        found.append(Objects(np.array(boxes, np.float64), np.array([1, 2]), np.ones(2), no, yes, masks))
    index = SampleIndex.from_folder(folder, cache=False, progress=False)
    return Truth(index, found, ["ellipse", "polygon"], voc=False)


def box_of(seen: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize(("size", "longest", "shorts"), [(120, 1000, ()), (300, 320, (60, 150, 300))])
def test_boxes_and_masks_lie_on_what_the_view_shows(objects_on_black, device, size, longest, shorts):
    truth, view = objects_on_black, View(size=size, crop="whole", longest=longest, shorts=shorts, flip=0.5)
    seen = set()
    for batch in ViewLoader(truth.index, [view], 4, device=device, **RAW):
        assert batch.views[0].shape[2] % 32 == batch.views[0].shape[3] % 32 == 0
        images, targets = targets_of(truth, batch, masks=True)
        for (row, image, mirrored), target in zip(views_of(batch), targets, strict=True):
            height, width = truth.index.sizes[row].tolist()
            assert (image[2] == float(row)).all(), "each image has its own pixels, and no padding"
            short, long = sorted(image.shape[1:])
            assert short in (shorts or (size,)) or long == longest
            assert abs(image.shape[1] / image.shape[2] / (height / width) - 1) < 1 / short
            for channel, box, mask in zip(image[:2], target["boxes"], target["masks"], strict=True):
                shown = (channel > 127).cpu().numpy()
                # A view's pixel is known to half of itself, and to half of a stored one.
                reach = 1 + 0.5 * max(1, image.shape[1] / height)
                assert np.abs(np.array(box_of(shown)) - box.cpu().numpy()).max() <= reach + 0.5
                both, either = (shown & mask.cpu().numpy()), (shown | mask.cpu().numpy())
                assert both.sum() > 0.9 * either.sum()
            seen.add(mirrored)
        padded = batch.views[0].sum(dim=(2, 3)).cpu()
        assert torch.equal(padded, torch.stack([image.sum(dim=(1, 2)) for image in images]).cpu()), "zeros"
    assert seen == {False, True}


def test_views_are_the_same_in_any_batch_and_on_any_number_of_ranks(objects_on_black, device):
    view = View(size=100, crop="whole", longest=160, shorts=(50, 75, 100), flip=0.5)

    def shown(batch: int, rank: int, world: int) -> dict[int, bytes]:
        loader = ViewLoader(objects_on_black.index, [view], batch, device=device, rank=rank, world=world)
        found = (each for batch in loader for each in views_of(batch))
        return {row: image.cpu().numpy().tobytes() for row, image, _ in found}

    assert shown(8, 0, 1) == shown(2, 0, 2) | shown(2, 1, 2)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools 2.0.11
def test_a_mask_is_painted_where_it_lies_as_if_the_whole_view_were_filled():
    random = np.random.default_rng(0)
    for _ in range(100):
        size, shape = random.integers(20, 300, (2, 2)).tolist()
        centre = random.uniform(-0.3, 1.3, 2) * size[::-1]  # some lie outside of the image in part or wholly
        polygons = [centre + random.normal(0, 30, (random.integers(3, 9), 2)) for _ in range(2)]
        scaled = [(each * (shape[1] / size[1], shape[0] / size[0])).ravel().tolist() for each in polygons]
        expected = mask_tools.decode(mask_tools.merge(mask_tools.frPyObjects(scaled, *shape)))
        (top, left), part = raster(polygons, size, shape)
        found = np.zeros(shape, np.uint8)
        found[top : top + part.shape[0], left : left + part.shape[1]] = part
        assert (found == expected).all()


def test_a_crowd_is_no_object_to_train_on(objects_on_black):
    objects = objects_on_black.objects[0]._replace(trained=np.array([False, True]))
    moved = in_view(objects, SIZES[0], SIZES[0], False, masks=True)
    assert moved["labels"].tolist() == [2]
    assert moved["boxes"].shape == (1, 4)
    assert moved["masks"].shape == (1, *SIZES[0])


def test_views_that_keep_their_shape_need_room(tmp_path: Path):
    with pytest.raises(ValueError, match="longest 50 is below the short side"):
        View(size=100, longest=50)
    with pytest.raises(ValueError, match="give longest"):
        View(size=100, shorts=(50,))
