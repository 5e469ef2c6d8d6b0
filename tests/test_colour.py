"""The photometric operators of the graph against torchvision's, on real photographs.

The tolerances here are the table in docs/colour.md; all figures are in units of 1/255.
"""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from dali_views import SampleIndex, View, ViewLoader
from dali_views.graph.build import build, inputs
from dali_views.graph.views_cpu import Views
from dali_views.plan import draw as plan

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
NEUTRAL = {
    "axes": np.eye(2, 3, dtype=np.float32),
    "matrix": np.eye(3, dtype=np.float32),
    "pivot": np.zeros(3, np.float32),
    "sigma": np.array(0.01, np.float32),
    "window": np.array(1, np.int32),
    "solarise": np.array(256, np.int16),
}
SIDE = 160


@pytest.fixture(scope="module")
def pixels(photographs: Path) -> np.ndarray:
    """(N, S, S, 3) photographs, cut to squares so that no resize stands between the two implementations."""
    squares = []
    for file in sorted(photographs.iterdir()):
        image = Image.open(file).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        squares.append(np.asarray(image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))))
    return np.stack(squares)


@pytest.fixture(params=["cpu", "operators on the cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def way(request: pytest.FixtureRequest) -> str:
    """The one pass of the CPU, and the GPU's operators on both devices."""
    return str(request.param)


def through_graph(pixels: np.ndarray, view: View, way: str, **parameters: object) -> np.ndarray:
    """(N, S, S, 3) the pixels after the view's operators, each sample with the parameters given."""
    n, device = len(pixels), way.split()[-1]
    neutral = {name: np.repeat(value[None], n, axis=0) for name, value in NEUTRAL.items()}
    neutral |= {"start": np.zeros((n, 2), np.float32), "end": np.full((n, 2), pixels.shape[1], np.float32)}
    neutral["shape"] = neutral["end"]
    drawn = plan.ViewPlan(**{**neutral, **parameters})
    if way == "cpu":
        maker = Views([view], threads=2, dtype="float32", **RAW)
        maker.expect([drawn])
        maker(list(pixels))
        return maker.take()[0].numpy()
    graph = build(
        [view],
        lambda: inputs([pixels], [], [view], [drawn]),
        batch_size=n,
        device=device,
        device_id=0 if device == "gpu" else None,
        threads=1,
        form="pixels",
        dtype="float32",
        hw_decoder_load=0.0,
        **RAW,
    )
    (out,) = graph.run()
    return torch.from_dlpack(out.as_tensor()).cpu().numpy()


def reference(pixels: np.ndarray, function) -> np.ndarray:
    """(N, S, S, 3) torchvision's result, one image at a time, in PIL as data sets are read."""
    return np.stack([np.asarray(function(Image.fromarray(image))) for image in pixels]).astype(np.float64)


def errors(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Largest and mean absolute difference."""
    difference = np.abs(ours.astype(np.float64) - theirs)
    return difference.max(), difference.mean()


ANY = View(size=SIDE, jitter=1.0, grayscale=0.5, blur=0.5, solarise=0.5)


def test_neutral_parameters_leave_every_pixel_as_it_was(pixels, way):
    assert np.array_equal(through_graph(pixels, ANY, way), pixels.astype(np.float32))


@pytest.mark.parametrize("factor", [0.2, 0.6, 1.4, 1.8])
@pytest.mark.parametrize("operator", ["brightness", "contrast", "saturation"])
def test_an_operator_of_the_jitter_is_torchvisions(pixels, way, operator, factor):
    """Contrast pivots on the grey mean of each view."""
    n = len(pixels)
    given = {"matrix": np.tile(factor * np.eye(3, dtype=np.float32), (n, 1, 1))}
    if operator == "contrast":
        given["pivot"] = np.full((n, 3), 1 - factor, np.float32)
    elif operator == "saturation":
        given["matrix"] = plan.saturation_matrix(np.full(n, factor)).astype(np.float32)
    theirs = reference(pixels, lambda image: getattr(F, f"adjust_{operator}")(image, factor))
    assert errors(through_graph(pixels, ANY, way, **given), theirs)[0] <= 1


def test_grayscale_is_torchvisions(pixels, way):
    matrix = plan.saturation_matrix(np.zeros(len(pixels))).astype(np.float32)
    ours = through_graph(pixels, ANY, way, matrix=matrix)
    assert errors(ours, reference(pixels, lambda i: F.to_grayscale(i, 3)))[0] <= 1
    assert np.ptp(ours, axis=-1).max() == 0


@pytest.mark.parametrize("turn", [-0.1, 0.05, 0.1, 0.2])
def test_hue_turns_as_far_as_torchvisions(pixels, way, turn):
    matrix = plan.hue_matrix(np.full(len(pixels), turn)).astype(np.float32)
    ours = through_graph(pixels, ANY, way, matrix=matrix)
    theirs = reference(pixels, lambda i: F.adjust_hue(i, turn))
    # Torchvision keeps an HSV pixel's largest channel, a rotation its mean: brightness differs, hue agrees.
    assert hue_error(ours, theirs) <= 2.5
    assert errors(ours, theirs)[1] < errors(pixels, theirs)[1]


def test_a_grey_view_is_the_grey_of_the_turned_colours(pixels):
    coloured = View(size=SIDE, crop="whole", jitter=1.0, hue=0.2)
    drawn, grey = (
        ViewLoader(SampleIndex.from_arrays(pixels), [view], len(pixels), device="cpu").plan_at(0).views[0]
        for view in (coloured, replace(coloured, grayscale=1.0))
    )
    np.testing.assert_allclose(grey.matrix, plan.saturation_matrix(np.zeros(1)) @ drawn.matrix, atol=1e-6)
    assert np.ptp(drawn.matrix - grey.matrix) > 0.1


def hue_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Median absolute difference of HSV hue in degrees, over pixels with a clear colour."""
    rounded = [images.round().clip(0, 255).astype(np.uint8) for images in (ours, theirs)]
    hsv = [np.stack([np.asarray(Image.fromarray(i).convert("HSV")) for i in images]) for images in rounded]
    vivid = np.all(
        [(image[..., 1] > 80) & (image[..., 2] > 60) & (image[..., 2] < 250) for image in hsv], axis=0
    )
    turn = np.abs(hsv[0][..., 0].astype(float) - hsv[1][..., 0])[vivid] * (360 / 255)
    return float(np.median(np.minimum(turn, 360 - turn)))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_a_gaussian_of_the_sigma_asked_for(pixels, way, sigma):
    n = len(pixels)
    window = 2 * int(np.ceil(3 * sigma)) + 1
    ours = through_graph(
        pixels, ANY, way, sigma=np.full(n, sigma, np.float32), window=np.full(n, window, np.int32)
    )
    exact = F.gaussian_blur(torch.from_numpy(pixels).permute(0, 3, 1, 2), [23, 23], [sigma, sigma])
    assert errors(ours, exact.permute(0, 2, 3, 1).numpy())[0] <= 2


def test_solarise_inverts_from_the_threshold_on(pixels, way):
    ours = through_graph(pixels, ANY, way, solarise=np.full(len(pixels), 128, np.int16))
    assert np.array_equal(ours, reference(pixels, lambda i: F.solarize(i, 128)))


def test_the_one_pass_and_the_operators_make_the_same_views(pixels):
    """All at once, on odd sizes too: tiny views are blurred by windows wider than they are."""
    for side in (1, 2, 5, 33, SIDE):
        small = np.ascontiguousarray(pixels[:, :side, :side])
        index = SampleIndex.from_arrays(small)
        view = View(
            size=side, crop="whole", jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1,
            grayscale=0.2, blur=0.5, solarise=0.3,
        )  # fmt: skip
        drawn = ViewLoader(index, [view], len(small), device="cpu", shuffle=False).plan_at(0).views[0]
        given = {f.name: getattr(drawn, f.name) for f in fields(drawn) if f.name not in ("start", "end")}
        fused, operators = (
            through_graph(small, view, way, **given) for way in ("cpu", "operators on the cpu")
        )
        difference = np.abs(fused - operators)
        solarised = (drawn.solarise == 128)[:, None, None, None]
        # A value that rounds to 127 one way and to 128 the other is inverted by one of them only.
        edge = solarised & ((np.abs(fused - 127.5) <= 1) | (np.abs(operators - 127.5) <= 1))
        assert difference[~edge].max(initial=0.0) <= 1
        assert difference.mean() < 0.05 or side < 5  # few values
        assert np.ptp(fused) > 100 or side < 5


def test_the_whole_jitter_is_as_near_to_torchvisions_as_its_own_orders_are_to_each_other(pixels, device):
    """Torchvision shuffles its operators and rounds and clips after each; the graph clips once."""
    index = SampleIndex.from_arrays(pixels)
    view = View(size=SIDE, crop="whole", jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4)
    loader = ViewLoader(index, [view], len(pixels), device=device, shuffle=False, **RAW)
    (batch,) = list(loader)
    drawn = loader.plan_at(0).views[0]
    gains = drawn.matrix.sum(axis=2)[:, 0]
    near, apart = [], []
    for number in range(len(pixels)):
        # matrix = b c (s I + (1 - s) luma), pivot = b (1 - c)
        brightness = float(gains[number] + drawn.pivot[number, 0])
        contrast = float(gains[number] / brightness)
        saturation = float((drawn.matrix[number, 0, 0] - drawn.matrix[number, 1, 0]) / gains[number])
        steps = [
            lambda i, f=brightness: F.adjust_brightness(i, f),
            lambda i, f=contrast: F.adjust_contrast(i, f),
            lambda i, f=saturation: F.adjust_saturation(i, f),
        ]
        results = []
        for chain in itertools.permutations(steps):
            image = Image.fromarray(pixels[number])
            for step in chain:
                image = step(image)
            results.append(np.asarray(image, np.float64))
        ours = batch.views[0][number].permute(1, 2, 0).cpu().numpy()
        near.append(errors(ours, results[0])[1])
        apart.append(max(errors(one, other)[1] for one, other in itertools.combinations(results, 2)))
    # PIL cuts off fractions after each operator (a mean of up to 1.5 in all); the rest is our one clipping.
    assert (np.array(near) <= np.array(apart) + 2.0).all()


def test_resized_crops_are_pils_within_rounding(photographs, device):
    index = SampleIndex.from_folder(photographs, cache=False, progress=False)
    for interpolation, resample in (
        ("linear", Image.Resampling.BILINEAR),
        ("cubic", Image.Resampling.BICUBIC),
    ):
        view = View(size=96, flip=0.5, interpolation=interpolation)
        loader = ViewLoader(index, [view], 1, device=device, **RAW)
        for number, batch in enumerate(loader):
            if number == 8:
                break
            image = Image.open(index.path(int(batch.index))).convert("RGB")
            y0, x0, y1, x1 = (batch.crops[0, 0].cpu().numpy() * np.tile(image.size[::-1], 2)).round()
            theirs = np.asarray(image.resize((96, 96), resample, box=(x0, y0, x1, y1)), np.float64)
            if batch.flipped[0, 0]:
                theirs = theirs[:, ::-1]
            ours = batch.views[0][0].permute(1, 2, 0).cpu().numpy()
            # The GPU decodes JPEG chroma with another interpolation than libjpeg.
            assert errors(ours, theirs)[1] <= (0.3 if device == "cpu" else 4.0)
