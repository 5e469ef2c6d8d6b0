"""Maps lie where their cells look: dots at known places are found there, whatever the network."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from dali_views.maps.align import Centres, align, cell_centres
from dali_views.maps.coordinates import map_to_image
from dali_views.maps.heatmap import feature_grid, heatmaps, layer_centres
from dali_views.maps.tap import FeatureTap

DILATED = partial(models.resnet50, replace_stride_with_dilation=[False, True, True])
LITE = partial(timm.create_model, "tf_efficientnet_lite0")
GATED = partial(timm.create_model, "eva02_tiny_patch14_224")
SWIN = partial(timm.create_model, "swin_tiny_patch4_window7_224")
VIT = partial(timm.create_model, "vit_tiny_patch16_224")


def offsets(make: Callable[[], nn.Module], layer: str, size: int, **grid: object) -> list[float]:
    """By how many cells the first cell's centre lies beyond that of the square drawn for it, y and x."""
    centres = layer_centres(make(), torch.zeros(2, 3, size, size), layer, **grid)  # type: ignore[arg-type]
    assert centres is not None
    return [start / step - 0.5 for start, step in zip(*centres, strict=True)]


# By hand for a ResNet: all cells begin at pixel 0, whose centre is 0.5; so the offset is 0.5 / stride - 0.5.
# Padding of TensorFlow's kind is larger at the end, so that the offset depends on the size.
@pytest.mark.parametrize(
    ("make", "layer", "size", "expected"),
    [
        *((models.resnet18, f"layer{k}", s, 0.5 / 2 ** (k + 1) - 0.5) for k in (2, 3, 4) for s in (64, 250)),
        (DILATED, "layer4", 224, 0.5 / 8 - 0.5),
        (LITE, "blocks.6", 224, 0.484375),
        (LITE, "blocks.6", 250, 0.296875),
        (models.mobilenet_v3_small, "features.12", 96, 0.5 / 32 - 0.5),
        (models.convnext_tiny, "features.7", 250, 0.0),
    ],
)
def test_centres_of_convolutions_are_those_of_their_arithmetic(make, layer, size, expected):
    assert offsets(make, layer, size) == pytest.approx([expected] * 2, abs=1e-3)


@pytest.mark.parametrize(
    ("make", "layer", "size", "grid"),
    [
        (VIT, "norm", 224, {"prefix_tokens": 1}),
        (models.vit_b_16, "encoder.ln", 224, {"prefix_tokens": 1}),
        (GATED, "norm", 224, {"prefix_tokens": 1}),
        (models.swin_t, "features.7", 250, {"channels_last": True}),
        (
            partial(timm.create_model, "swin_tiny_patch4_window7_224"),
            "layers.3",
            224,
            {"channels_last": True},
        ),
    ],
)
def test_tokens_lie_in_their_patches(make, layer, size, grid):
    assert offsets(make, layer, size, **grid) == pytest.approx([0, 0], abs=1e-3)


class Found:
    """Where random networks see a blurred dot, before and after alignment: offsets in cells, y and x.

    The kernels of a random network lean to one side; those of its twin, turned by 180 degrees, to the other.
    """

    def __init__(self, make: Callable[[], nn.Module], layer: str, size: int, **grid: object) -> None:
        self.before, self.after = [], []
        for seed in range(6):
            torch.manual_seed(seed // 2)
            net = make().eval()
            for kernel in net.parameters() if seed % 2 else ():
                if kernel.ndim == 4:
                    kernel.data = kernel.data.flip(2, 3)
            centres = layer_centres(net, torch.zeros(1, 3, size, size), layer, **grid)  # type: ignore[arg-type]
            assert centres is not None
            places = 0.25 + 0.5 * torch.rand(16, 2)
            pixels = (torch.arange(size) + 0.5) / size
            far = (pixels[:, None] - places[:, :1, None]) ** 2 + (pixels - places[:, 1:, None]) ** 2
            dots = 2 * torch.exp(-2 * far / centres.step[0] ** 2)[:, None].expand(-1, 3, -1, -1)
            with FeatureTap(net, layer) as tap, torch.no_grad():
                features = []
                for images in (dots, torch.zeros_like(dots[:1])):
                    net(images)
                    features.append(feature_grid(tap.features, **grid))  # type: ignore[arg-type]
            response = (features[0] - features[1]).norm(dim=1)
            for maps, found in ((response, self.before), (align(response, centres), self.after)):
                found.append((self.centre(maps) - places) * torch.tensor(maps.shape[1:]))

    @staticmethod
    def centre(maps: Tensor) -> Tensor:
        """(B, 2) centre of mass of what stands out of a map."""
        mass = (maps - maps.flatten(1).median(1).values[:, None, None]).clamp(min=0) ** 2
        y, x = ((torch.arange(n) + 0.5) / n for n in maps.shape[1:])
        return torch.stack([mass.sum(2) @ y, mass.sum(1) @ x], 1) / mass.sum((1, 2))[:, None]


@pytest.mark.parametrize(
    ("make", "layer", "size", "grid"),
    [
        (models.resnet18, "layer3", 96, {}),
        pytest.param(models.resnet18, "layer2", 224, {}, marks=pytest.mark.slow),
        pytest.param(models.resnet18, "layer4", 250, {}, marks=pytest.mark.slow),
        pytest.param(models.resnet50, "layer4", 224, {}, marks=pytest.mark.slow),
        pytest.param(DILATED, "layer4", 224, {}, marks=pytest.mark.slow),
        pytest.param(LITE, "blocks.4", 250, {}, marks=pytest.mark.slow),
        pytest.param(models.convnext_tiny, "features.5", 224, {}, marks=pytest.mark.slow),
        pytest.param(VIT, "norm", 224, {"prefix_tokens": 1}, marks=pytest.mark.slow),
        pytest.param(models.swin_t, "features.5", 250, {"channels_last": True}, marks=pytest.mark.slow),
    ],
)
def test_a_dot_is_seen_where_it_is(make, layer, size, grid):
    found = Found(make, layer, size, **grid)
    assert torch.cat(found.after).mean(0).abs().max() < 0.1
    if make is models.resnet18 and size != 250:
        assert torch.cat(found.before).mean(0).min() > 0.3  # as the layer has it


def test_an_aligned_map_of_a_view_is_right_when_the_view_was_mirrored():
    """A ramp over the image, seen by cells half a cell off in a crop and in its mirror image."""
    centres = Centres((0.02, 0.02), (0.1, 0.1))
    crop = torch.tensor([[0.2, 0.1, 0.8, 0.7]]).expand(2, -1)
    flipped = torch.tensor([False, True])
    seen = 0.02 + 0.1 * torch.arange(10.0)  # x in the view
    in_image = 0.1 + 0.6 * torch.stack([seen, 1 - seen])
    maps = in_image[:, None, :].expand(-1, 10, -1)
    placed, covered = map_to_image(align(maps, centres), crop, flipped, (20, 20))
    x = ((torch.arange(20) + 0.5) / 20).expand(2, 20, -1)
    inner = covered & (x > 0.2) & (x < 0.6)
    assert inner.sum() > 100
    torch.testing.assert_close(placed[inner], x[inner], atol=0.005, rtol=0)


def test_a_layer_without_an_even_grid_is_said_to_be_unaligned():
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.end = nn.Conv2d(3, 4, 2, 2), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.end(x[:, :, torch.randperm(x.shape[2], generator=torch.Generator().manual_seed(1))])

    class Fragile(Shuffled):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) == 2, "two images"
            return super().forward(x)

    images = torch.rand(2, 3, 32, 32)
    for kind, reason in ((Shuffled, "do not lie on an even grid"), (Fragile, "AssertionError: two images")):
        net = kind()
        with pytest.warns(UserWarning, match=f"{kind.__name__} are not aligned .*{reason}"):
            maps = heatmaps(net, images, "end")
        torch.testing.assert_close(maps, heatmaps(net, images, "end", aligned=False))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            heatmaps(net, images, "end")


def test_finding_centres_changes_nothing_and_is_done_once_per_layer_and_size():
    net = models.resnet18()
    before, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    calls = []
    net.layer3.register_forward_hook(lambda *_: calls.append(1))
    for size in (64, 64, 96):
        heatmaps(net, torch.zeros(1, 3, size, size), "layer3")
    assert len(calls) == 5  # three maps, two sizes
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_weights_do_not_matter():
    net = models.resnet18()
    for parameter in net.parameters():
        nn.init.constant_(parameter, torch.nan)
    assert offsets(lambda: net, "layer2", 64) == pytest.approx([0.5 / 8 - 0.5] * 2, abs=1e-3)
    start, step = cell_centres(net, lambda x: x, torch.zeros(1, 3, 8, 8), "itself") or ((), ())
    assert (start, step) == (pytest.approx((1 / 16, 1 / 16)), pytest.approx((1 / 8, 1 / 8)))
