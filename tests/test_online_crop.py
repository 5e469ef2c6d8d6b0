"""Heatmaps put together from the views of training: where they end up, and what boxes are read off them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dali_views import SampleIndex, View, ViewLoader
from dali_views.maps.boxes import boxes_from_maps
from dali_views.maps.coordinates import iou, map_to_view
from trainers.guides.kept_maps import KeptMaps, ViewMaps

CPU = torch.device("cpu")


class RedNet(nn.Module):
    """Responds to red and to nothing else; stride 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 4, stride=4)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -0.7, -0.7]).view(1, 3, 1, 1).expand(1, 3, 4, 4) / 16)
            self.conv.bias.fill_(-0.3)  # type: ignore[union-attr]
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        return self.relu(self.conv(images)).mean((2, 3))


def test_maps_of_views_seen_in_training_find_the_red_object() -> None:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 120, (30, 96, 96, 3), dtype=np.uint8)
    corners = draw.integers(0, 48, (30, 2))
    truth = np.concatenate([corners, corners + draw.integers(20, 48, (30, 2))], axis=1)
    for image, (y0, x0, y1, x1) in zip(images, truth, strict=True):
        image[y0:y1, x0:x1] = (255, 0, 0)
    net = RedNet().train()
    view = View(size=64, crop="random", scale=(0.2, 1.0), flip=0.5, vflip=0.5, rotate90=0.75)
    index = SampleIndex.from_arrays(images)
    loader = ViewLoader(index, [view, view], 10, device="cpu", mean=(0, 0, 0), std=(1, 1, 1))
    tap, maps = ViewMaps(net, "relu"), KeptMaps(len(index), 14, 0.3, CPU)
    for epoch in range(8):
        loader.set_epoch(epoch)
        for batch in loader:
            net(torch.cat(batch.views))  # both views as one batch, as SimCLR does
            for number, seen in enumerate(tap.take(len(batch))):
                place = (each[:, number] for each in (batch.crops, batch.flipped, batch.rotated))
                maps.add(batch.index, seen, *place)
    boxes = boxes_from_maps(maps.normalised(slice(None)), 0.4, (96, 96))
    assert iou(boxes, torch.from_numpy(truth / 96).float()).mean() > 0.7


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("angle", range(4))
def test_a_pattern_comes_back_where_it_was_cut_for_any_crop(flip: bool, angle: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 28, 28, generator=generator)
    image = nn.functional.interpolate(image[None, :, :7, :7], size=28, mode="bilinear")[0]
    flipped, rotated = torch.tensor([flip]), torch.tensor([angle], dtype=torch.uint8)
    for crop in ([0.0, 0.0, 1.0, 1.0], [0.0, 0.25, 0.5, 0.75], [0.25, 0.5, 1.0, 1.0]):
        crops = torch.tensor([crop])
        maps = KeptMaps(1, 28, 1.0, CPU)
        cells = round((crop[2] - crop[0]) * 28), round((crop[3] - crop[1]) * 28)
        seen = map_to_view(image, crops, flipped, cells[:: 1 - 2 * (angle % 2)], rotated)
        maps.add(torch.tensor([0]), seen, crops, flipped, rotated)
        y0, x0, y1, x1 = (round(28 * edge) for edge in crop)
        kept = maps.maps[0].float()
        torch.testing.assert_close(kept[y0:y1, x0:x1], image[0, y0:y1, x0:x1], atol=2e-3, rtol=0)
        outside = torch.ones(28, 28, dtype=torch.bool)
        outside[y0:y1, x0:x1] = False
        assert kept[outside].isnan().all()


def test_cells_are_averaged_exponentially_and_only_where_a_view_shows_them() -> None:
    maps = KeptMaps(3, 4, 0.25, CPU)
    whole, left = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 1.0, 0.5]])
    row, upright = torch.tensor([1]), torch.tensor([False])
    maps.add(row, torch.full((1, 2, 2), 4.0), whole, upright)
    maps.add(row, torch.full((1, 2, 2), 8.0), left, upright)
    assert maps.maps[1].tolist() == [[5.0, 5.0, 4.0, 4.0]] * 4
    assert maps.maps[[0, 2]].isnan().all()
    assert maps.fresh.tolist() == [False, True, False]
    assert maps.normalised(row)[0].tolist() == [[1.0, 1.0, 0.0, 0.0]] * 4
    assert (maps.normalised(torch.tensor([0])) == 1).all(), "what was never seen is the whole image"


def test_views_come_in_order_whether_the_network_saw_them_together_or_apart() -> None:
    net = RedNet().train()
    red = torch.tensor([1.0, 0.2, 0.2]).view(3, 1, 1)
    views = [red * torch.rand(3, 3, size, size) for size in (16, 16, 8, 8, 8)]
    together, apart = ViewMaps(net, "relu"), ViewMaps(net, "relu")
    net(torch.cat(views[:2]))
    net(torch.cat(views[2:]))
    first = together.take(3)
    assert [tuple(seen.shape) for seen in first] == [(3, 4, 4)] * 2 + [(3, 2, 2)] * 3
    apart.take(3)
    for view in views:
        net(view)
    second = apart.take(3)
    for one, other in zip(first, second, strict=True):
        # Standardised over another batch: the same up to scale and shift.
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert correlation > 0.999
    net.eval()(views[0])
    assert apart.take(3) == []


def test_maps_restored_from_a_state_are_the_same_and_others_are_refused() -> None:
    maps, other = KeptMaps(3, 2, 0.5, CPU), KeptMaps(3, 2, 0.5, CPU)
    maps.put(torch.tensor([1]), torch.arange(16.0).view(1, 4, 4))
    assert maps.maps[1].tolist() == [[2.5, 4.5], [10.5, 12.5]], "a whole map replaces the average"
    other.load_state_dict(maps.state_dict())
    assert torch.equal(other.maps.nan_to_num(-1), maps.maps.nan_to_num(-1))
    assert torch.equal(other.fresh, maps.fresh)
    with pytest.raises(ValueError, match="resume with the data and the guide"):
        KeptMaps(4, 2, 0.5, CPU).load_state_dict(maps.state_dict())
    with pytest.raises(ValueError, match="no layer 'rel'; the nearest names are relu"):
        ViewMaps(RedNet(), "rel")
