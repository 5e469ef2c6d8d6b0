"""Maps lie where the image has what they show: dots at known places are found there, whatever the network."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from dali_views.maps.align import Offset, align
from dali_views.maps.coordinates import map_to_image
from dali_views.maps.heatmap import align_maps, feature_grid, heatmaps, layer_offset
from dali_views.maps.tap import FeatureTap

DILATED = partial(timm.create_model, "resnet26", output_stride=8)
CONVNEXT = partial(timm.create_model, "convnext_atto")
SWIN = partial(timm.create_model, "swin_tiny_patch4_window7_224")
VIT = partial(timm.create_model, "vit_tiny_patch16_224")


class Column(nn.Module):
    """Sees one column of each patch of 8 pixels, as a trained or an uneven kernel may."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self.conv, self.end = nn.Conv2d(3, 16, 8, 8, bias=False), nn.ReLU()
        torch.nn.init.normal_(self.conv.weight, generator=torch.Generator().manual_seed(0))
        seen = torch.arange(8) == column
        self.conv.weight.data *= seen

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.conv(x))


@pytest.mark.parametrize("column", [0, 3, 7])
def test_an_offset_that_the_weights_make_is_found(column):
    offset = layer_offset(Column(column).eval(), torch.zeros(1, 3, 128, 128), "end")
    # Cell i looks at i + (column + 0.5) / 8, and is drawn around i + 0.5.
    assert offset.x == pytest.approx(0.5 - (column + 0.5) / 8, abs=0.1)
    assert offset.y == pytest.approx(0, abs=0.1)


def test_half_images_of_a_network_under_autocast_are_no_obstacle():
    net, images = Column(0).eval(), torch.zeros(1, 3, 128, 128)
    expected = layer_offset(net, images, "end")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_offset(Column(0).eval(), images.half(), "end") == expected
    assert layer_offset(Column(0).eval().bfloat16(), images.bfloat16(), "end") == pytest.approx(
        expected, abs=0.05
    )


def test_a_constant_map_stays_constant():
    maps = torch.stack([torch.ones(8, 8), torch.linspace(0, 1, 64).view(8, 8)])
    placed = align_maps(maps, Offset(0.43, 0.43))
    assert torch.equal(placed[0], maps[0])
    assert (placed[1].min(), placed[1].max()) == (0, 1)


def test_tokens_lie_in_their_patches():
    torch.manual_seed(0)
    offset = layer_offset(VIT().eval(), torch.zeros(1, 3, 224, 224), "blocks.5", prefix_tokens=1)
    assert offset == pytest.approx((0, 0), abs=0.05)


def seen(net: nn.Module, layer: str, size: int, **grid: object) -> tuple[Tensor, Tensor]:
    """Where a network sees blurred dots before and after alignment: (16, 2) offsets in cells, y and x."""
    places = 0.25 + 0.5 * torch.rand(16, 2, generator=torch.Generator().manual_seed(1))
    pixels = (torch.arange(size) + 0.5) / size
    far = (pixels[:, None] - places[:, :1, None]) ** 2 + (pixels - places[:, 1:, None]) ** 2
    offset = layer_offset(net, torch.zeros(1, 3, size, size), layer, **grid)
    assert offset is not None
    with FeatureTap(net, layer) as tap, torch.no_grad():
        features = []
        for wide in (None, 2.0):  # the plain image, then dots of half a cell
            dots = torch.zeros_like(far[:1])
            if wide is not None:
                cell = 1 / features[0].shape[2]
                dots = 2 * torch.exp(-wide * far / cell**2)
            net(dots[:, None].expand(-1, 3, -1, -1))
            features.append(feature_grid(tap.features, **grid))
    response = (features[1] - features[0]).norm(dim=1)
    found = [
        (centre(maps) - places) * torch.tensor(maps.shape[1:]) for maps in (response, align(response, offset))
    ]
    return found[0], found[1]


def centre(maps: Tensor) -> Tensor:
    """(B, 2) centre of mass of what stands out of a map."""
    mass = (maps - maps.flatten(1).median(1).values[:, None, None]).clamp(min=0) ** 2
    y, x = ((torch.arange(n) + 0.5) / n for n in maps.shape[1:])
    return torch.stack([mass.sum(2) @ y, mass.sum(1) @ x], 1) / mass.sum((1, 2))[:, None]


@pytest.mark.parametrize(
    ("make", "layer", "size", "grid"),
    [
        (models.resnet18, "layer3", 128, {}),
        pytest.param(models.resnet18, "layer2", 64, {}, marks=pytest.mark.slow),
        pytest.param(models.resnet18, "layer4", 250, {}, marks=pytest.mark.slow),
        pytest.param(models.resnet50, "layer3", 128, {}, marks=pytest.mark.slow),
        pytest.param(DILATED, "layer4", 96, {}, marks=pytest.mark.slow),
        pytest.param(CONVNEXT, "stages.2", 224, {}, marks=pytest.mark.slow),
        pytest.param(VIT, "norm", 224, {"prefix_tokens": 1}, marks=pytest.mark.slow),
        pytest.param(SWIN, "layers.2", 224, {"channels_last": True}, marks=pytest.mark.slow),
    ],
)
def test_a_dot_is_seen_where_it_is(make, layer, size, grid):
    before, after = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        plain, moved = seen(make().eval(), layer, size, **grid)
        before.append(plain.mean(0))
        after.append(moved.mean(0))
    assert torch.stack(after).mean(0).abs().max() < 0.1
    if make in (models.resnet18, models.resnet50):
        assert torch.stack(before).mean(0).min() > 0.3  # as the layer has it


def test_an_aligned_map_of_a_view_is_right_when_the_view_was_mirrored():
    """A ramp over the image, seen by cells that are off in a crop and in its mirror image."""
    crop = torch.tensor([[0.2, 0.1, 0.8, 0.7]]).expand(2, -1)
    flipped = torch.tensor([False, True])
    seen = 0.02 + 0.1 * torch.arange(10.0)  # x in the view where cells look, 0.3 cells left of their middle
    in_image = 0.1 + 0.6 * torch.stack([seen, 1 - seen])
    maps = in_image[:, None, :].expand(-1, 10, -1)
    placed, covered = map_to_image(align(maps, Offset(0.3, 0.3)), crop, flipped, (20, 20))
    x = ((torch.arange(20) + 0.5) / 20).expand(2, 20, -1)
    inner = covered & (x > 0.2) & (x < 0.6)
    assert inner.sum() > 100
    torch.testing.assert_close(placed[inner], x[inner], atol=0.005, rtol=0)


def test_a_layer_that_sees_mirror_images_otherwise_is_said_to_be_unaligned():
    class Shuffled(Column):
        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.end(x[:, :, torch.randperm(x.shape[2], generator=torch.Generator().manual_seed(1))])

    class Fragile(Column):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 2, "two images"
            return super().forward(x)

    images = torch.rand(2, 3, 128, 128)
    for kind, reason in (
        (Shuffled, "otherwise, with a correlation of"),
        (Fragile, "AssertionError: two images"),
    ):
        net = kind(3)
        with pytest.warns(UserWarning, match=f"{kind.__name__} are not aligned .*{reason}"):
            maps = heatmaps(net, images, "end")
        torch.testing.assert_close(maps, heatmaps(net, images, "end", aligned=False))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            heatmaps(net, images, "end")


def test_measuring_changes_nothing_and_is_done_once_per_layer_size_and_state_of_the_weights():
    net = Column(0)
    before, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    calls: list[int] = []
    net.end.register_forward_hook(lambda *_: calls.append(1))

    def measured(size: int) -> bool:
        calls.clear()
        heatmaps(net, torch.rand(1, 3, size, size), "end")
        return len(calls) > 1

    assert [measured(size) for size in (64, 64, 96, 96, 64)] == [True, False, True, False, False]
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with torch.no_grad():
        net.conv.weight.mul_(1.5)
    assert [measured(64), measured(64)] == [True, False]
    torch.set_rng_state(random)
    heatmaps(net, torch.zeros(1, 3, 32, 32), "end")
    assert torch.equal(torch.get_rng_state(), random)
