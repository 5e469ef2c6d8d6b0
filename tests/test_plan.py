"""The draw: crop laws against torchvision and against the published algorithm, and what may not matter."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from dali_views import View, recipes
from dali_views.plan import draw as plan
from dali_views.plan import rng
from dali_views.plan.epoch import pick_region
from dali_views.plan.joint import joint_shares, pair_shares
from dali_views.plan.views import complete

N = 20_000  # crops drawn by the plan, at a few microseconds
REFERENCES = 6_000  # crops of torchvision and of the transcription, one at a time
# For part of the crops of the last two, tall and wide, all ten tries fail.
SIZES = [(375, 500), (32, 32), (300, 97), (64, 240)]


def rectangles(view, size, box=(0.0, 0.0, 1.0, 1.0), n=N, written=True, seed=0):
    """(n, 4) drawn crops in pixels of n samples of one size."""
    keys, sizes = rng.keys(seed, 0, np.arange(n), 0), np.tile(np.array(size, np.int64), (n, 1))
    return plan.crop_rectangles(view, keys, sizes, np.tile(np.array(box), (n, 1)), np.full(n, written))


def transcribed_contrastive_crop(draw, size, box, scale, ratio, alpha):
    """ContrastiveCrop as the paper's code has it, one sample at a time, with Python's own arithmetic."""
    height, width = size
    for _ in range(10):
        area = height * width * draw.uniform(*scale)
        aspect = math.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            y_lo = min(max(int(height * box[0]) - h // 2, 0), height - h)
            y_hi = min(max(int(height * box[2]) - h // 2, 0), height - h)
            x_lo = min(max(int(width * box[1]) - w // 2, 0), width - w)
            x_hi = min(max(int(width * box[3]) - w // 2, 0), width - w)
            top = y_lo + int((y_hi - y_lo) * draw.beta(alpha, alpha))
            left = x_lo + int((x_hi - x_lo) * draw.beta(alpha, alpha))
            return top, left, top + h, left + w
    shape = width / height
    w, h = width, height
    if shape < ratio[0]:
        h = round(w / ratio[0])
    elif shape > ratio[1]:
        w = round(h * ratio[1])
    top, left = (height - h) // 2, (width - w) // 2
    return top, left, top + h, left + w


def assert_same_law(ours, theirs):
    """Kolmogorov-Smirnov on the corners, the sides, the area and a diagonal of two sets of rectangles."""

    def features(r):
        height, width = r[:, 2] - r[:, 0], r[:, 3] - r[:, 1]
        return [*r.T, height, width, height * width, r[:, 0] + r[:, 1]]

    for number, (one, other) in enumerate(zip(features(ours), features(theirs), strict=True)):
        assert stats.ks_2samp(one, other).pvalue > 1e-3, number


@pytest.mark.parametrize(
    ("size", "scale"), [*((size, (0.2, 1.0)) for size in SIZES), ((32, 32), (0.05, 0.14))]
)
def test_random_crops_follow_torchvisions_random_resized_crop(size, scale):
    torch.manual_seed(0)
    settings = (torch.empty(1, *size), list(scale), [3 / 4, 4 / 3])
    theirs = np.array([RandomResizedCrop.get_params(*settings) for _ in range(REFERENCES)], float)
    theirs[:, 2:] += theirs[:, :2]
    assert_same_law(rectangles(View(size=8, scale=scale), size), theirs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("box", "alpha"),
    [((0.0, 0.0, 1.0, 1.0), 1.0), ((0.25, 0.25, 0.75, 0.75), 0.6), ((0.5, 0.1, 0.6, 0.95), 0.1)],
)
def test_contrastive_crops_follow_the_published_algorithm(size, box, alpha):
    settings = (np.random.default_rng(1), size, box, (0.2, 1.0), (3 / 4, 4 / 3), alpha)
    theirs = np.array([transcribed_contrastive_crop(*settings) for _ in range(REFERENCES)], float)
    assert_same_law(rectangles(View(size=8, crop="contrastive", alpha=alpha), size, box), theirs)


@pytest.mark.parametrize("crop", ["contrastive", "inside"])
@pytest.mark.parametrize("dilate", [1.0, 1.5])
def test_a_sample_without_a_written_box_is_cropped_as_by_random_crops(crop, dilate):
    unwritten = rectangles(View(size=8, crop=crop, dilate=dilate), (375, 500), written=False)
    assert np.array_equal(unwritten, rectangles(View(size=8), (375, 500)))


@pytest.mark.parametrize("crop", ["contrastive", "inside"])
@pytest.mark.parametrize(
    ("box", "dilated"),
    [
        ((0.375, 0.25, 0.625, 0.5), (0.25, 0.125, 0.75, 0.625)),
        ((0.0, 0.75, 0.25, 1.0), (0.0, 0.625, 0.375, 1.0)),  # cut to the image, not pushed into it
        ((0.25, 0.25, 1.0, 0.75), (0.0, 0.0, 1.0, 1.0)),
    ],
)
def test_a_dilated_crop_is_one_of_the_box_enlarged_about_its_centre(crop, box, dilated):
    ours = rectangles(View(size=8, crop=crop, dilate=2.0), (320, 480), box)
    assert np.array_equal(ours, rectangles(View(size=8, crop=crop), (320, 480), dilated))
    assert not np.array_equal(ours, rectangles(View(size=8, crop=crop), (320, 480), box))


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 0.9)])
@pytest.mark.parametrize("beta", [0.0, 3.0, 0.5, -2.0])
def test_areas_of_a_pair_follow_the_published_joint_law(beta, scale):
    draw, (low, high) = np.random.default_rng(2), scale
    reach = math.log(high / low)
    log_ratio = draw.uniform(-reach, reach, N)
    if beta != 0.0:
        deviation = reach / abs(beta)
        law = stats.truncnorm(-reach / deviation, reach / deviation, scale=deviation)
        log_ratio = law.rvs(N, random_state=draw)
    if beta < 0.0:
        log_ratio = np.where(log_ratio < 0.0, -reach - log_ratio, reach - log_ratio)
    ratio = np.exp(log_ratio)
    theirs = draw.uniform(np.maximum(low, low / ratio), np.minimum(high / ratio, high))
    first, second = pair_shares(rng.keys(1, np.arange(N)), beta, scale)
    for one, other in ((first, theirs), (second, theirs * ratio), (np.log(second / first), log_ratio)):
        assert stats.ks_2samp(one, other).pvalue > 1e-3
    for share in (first, second):
        assert low <= share.min() < share.max() <= high


@pytest.mark.parametrize("crop", ["random", "contrastive"])
def test_crops_have_the_areas_of_their_pair_whatever_the_box(crop):
    views = recipes.moco_v2(scale=(0.2, 0.5), crop=crop, joint=0.0)  # up to 0.5 every ratio fits a square
    index, size, ones = np.arange(500), 600, np.ones(500)
    boxes = np.tile(np.array([0.2, 0.1, 0.7, 0.9], np.float32), (500, 1))
    samples = plan.Samples(index, np.full((500, 2), size, np.int32), boxes, ones, ones > 0)
    drawn = plan.draw(views, samples, samples, seed=5, epoch=2).crops
    areas = np.prod(drawn[..., 2:] - drawn[..., :2], axis=2)
    told = joint_shares(views[0], index, [0, 1], 5, 2).reshape(2, -1).T
    assert areas == pytest.approx(told, rel=0.01)  # sides are whole pixels, at least 230
    alone = plan.draw(recipes.moco_v2(scale=(0.2, 0.5), crop=crop), samples, samples, seed=5, epoch=2).crops
    usual = np.prod(alone[..., 2:] - alone[..., :2], axis=2)
    assert np.log(areas[:, 1] / areas[:, 0]).std() > 1.1 * np.log(usual[:, 1] / usual[:, 0]).std()


def test_views_that_share_a_draw_of_areas_need_the_same_law():
    view = View(size=8, joint=0.0)
    complete([view, view, View(size=4), View(size=4, twin_of=0)])
    for views in (
        [view, View(size=8, twin_of=0), view],
        [view],
        [view, View(size=8)],
        [view, View(size=8, joint=0.0, scale=(0.1, 1.0))],
    ):
        with pytest.raises(ValueError, match="give both the same joint and scale"):
            complete(views)


def test_first_second_and_local_views_follow_boxes_each_in_its_own_way():
    index, box = np.arange(300), np.array([0.2, 0.1, 0.7, 0.9])
    usual = {kind: full_plan(index, recipes.dino(crop=kind)).crops for kind in ("random", "inside")}
    small = full_plan(index, recipes.dino(local_crop="inside")).crops
    assert np.array_equal(small[:, :2], usual["random"][:, :2])
    assert np.array_equal(small[:, 2:], usual["inside"][:, 2:])
    large = full_plan(index, recipes.dino(crop="inside", local_crop="random", dilate=(1.0, 1.5))).crops
    assert np.array_equal(large[:, 0], usual["inside"][:, 0])
    assert np.array_equal(large[:, 2:], usual["random"][:, 2:])
    outside = np.concatenate([box[:2] - large[:, 1, :2], large[:, 1, 2:] - box[2:]], axis=1)
    assert (outside > 0.02).any(axis=1).mean() > 0.5
    assert (outside <= 0.25 * np.tile(box[2:] - box[:2], 2) + 0.013).all()  # and a pixel of 80
    mixed = full_plan(index, recipes.byol(crop="inside", second_crop="random")).crops
    assert np.array_equal(mixed[:, 1], full_plan(index, recipes.byol()).crops[:, 1])
    assert recipes.byol(crop="inside", second_crop="inside") == recipes.byol(crop="inside", dilate=(1.0, 1.0))


@pytest.mark.parametrize("side", [32, 96, 224, 333])
def test_a_box_of_whole_pixels_is_that_box_although_its_fractions_are_rounded(side):
    low = np.arange(side - 8)
    boxes = np.stack([low, low, low + 8, low + 8], axis=1).astype(np.float32) / np.float32(side)
    keys = rng.keys(0, 0, low, 0)
    size = np.full((len(low), 2), side)
    written = np.ones(len(low), bool)
    inside = plan.crop_rectangles(View(size=8, crop="inside"), keys, size, boxes.astype(np.float64), written)
    assert (inside[:, :2] >= low[:, None]).all()
    assert (inside[:, 2:] <= low[:, None] + 8).all()
    assert len(np.unique(inside - low[:, None], axis=0)) > 10


@pytest.mark.parametrize("crop", ["random", "contrastive", "inside", "whole", "centre"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (1000, 3), (333, 251)])
def test_every_crop_is_at_least_a_pixel_inside_the_image(crop, size):
    for box in ((0.0, 0.0, 1.0, 1.0), (0.2, 0.2, 0.20001, 0.20001)):
        ours = rectangles(View(size=8, crop=crop), size, box, n=200)
        assert (ours[:, :2] >= 0).all()
        assert (ours[:, 2:] <= size).all()
        assert (ours[:, 2:] - ours[:, :2] >= 1).all()


def test_the_centre_view_is_the_square_of_resize_256_and_centre_crop_224():
    ours = rectangles(View(size=224, crop="centre"), (300, 400), n=1)
    # Resize(256) scales by 256 / 300; the central 224 pixels are 262.5 of the original.
    assert ours[0, 2] - ours[0, 0] == pytest.approx(262.5, abs=0.5)
    assert ours[0, 3] - ours[0, 1] == pytest.approx(262.5, abs=0.5)
    assert ours[0, :2] + ours[0, 2:] == pytest.approx([300, 400], abs=1)


@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0, 2.5])
def test_the_closed_form_beta_has_the_beta_distribution(alpha):
    key = rng.keys(3, np.arange(100_000))
    draws = rng.symmetric_beta(rng.uniform(key, 0), rng.uniform(key, 1), alpha)
    assert stats.kstest(draws, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_a_very_small_alpha_gives_the_two_ends_and_no_invalid_number():
    key = rng.keys(3, np.arange(100_000))
    u, v = np.append(rng.uniform(key, 0), [0.0, 0.0, 0.5]), np.append(rng.uniform(key, 1), [0.25, 0.5, 0.25])
    draws = rng.symmetric_beta(u, v, 1e-3)
    assert ((draws < 0.01) | (draws > 0.99)).mean() > 0.98


def test_random_numbers_are_uniform_and_independent_between_slots_and_samples():
    draws = rng.uniform(rng.keys(0, 5, np.arange(50_000)), np.arange(8)[:, None])
    for row in draws:
        assert stats.kstest(row, "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(draws) - np.eye(8)).max() < 0.02
    neighbours = np.corrcoef(draws[0, :-1], draws[0, 1:])[0, 1]
    assert abs(neighbours) < 0.02


def full_plan(index, views, seed=0, epoch=0, boxes=None):
    sizes = np.stack([100 + index % 300, 80 + (index * 7) % 400], axis=1).astype(np.int32)
    if boxes is None:
        boxes = np.tile(np.array([0.2, 0.1, 0.7, 0.9], np.float32), (len(index), 1))
    n = len(index)
    samples = plan.Samples(index, sizes, boxes, np.ones(n, np.float32), np.ones(n, np.bool_))
    return plan.draw(views, samples, samples, seed=seed, epoch=epoch)


def arrays_of(drawn):
    """All arrays of a plan, the per-view ones stacked per view."""
    fields = ("start", "end", "axes", "matrix", "pivot", "sigma", "window", "solarise")
    return [
        drawn.crops,
        drawn.flipped,
        drawn.rotated,
        *(getattr(view, name) for view in drawn.views for name in fields),
    ]


@pytest.mark.parametrize(
    "more",
    [
        {"rotate90": 0.5},
        {"second_crop": "inside", "dilate": (1.2, 1.5), "joint": -1.0, "vflip": 0.5},
    ],
)
@pytest.mark.parametrize("name", ["moco_v2", "byol", "dino"])
def test_a_view_does_not_depend_on_the_samples_beside_it(name, more):
    views = recipes.BY_NAME[name](crop="contrastive", **more)
    views = complete([*views, View(size=8, within=0), View(size=8, twin_of=len(views))])
    index = np.arange(300)
    together = arrays_of(full_plan(index, views))
    shuffled = np.random.default_rng(0).permutation(300)
    for chunk in np.array_split(shuffled, 7):
        for whole, part in zip(together, arrays_of(full_plan(chunk, views)), strict=True):
            assert np.array_equal(whole[chunk], part)


def test_seed_epoch_sample_and_view_number_each_change_the_draw():
    views, index = recipes.moco_v2(crop="contrastive"), np.arange(200)
    base = full_plan(index, views)
    for other in (
        full_plan(index, views, seed=1),
        full_plan(index, views, epoch=1),
        full_plan(index + 300, views),
    ):
        assert (base.crops != other.crops).any(axis=2).mean() > 0.9
    assert (base.crops[:, 0] != base.crops[:, 1]).any(axis=1).mean() > 0.9


def test_probabilities_and_ranges_of_the_colour_parameters_are_those_of_the_recipe():
    drawn = full_plan(np.arange(20_000), recipes.byol())
    first, second = drawn.views
    grey = np.isclose(first.matrix[:, 0], first.matrix[:, 1], atol=1e-6).all(axis=1)
    assert abs(drawn.flipped[:, 0].mean() - 0.5) < 0.02
    assert abs(grey.mean() - 0.2) < 0.02
    assert (first.window > 1).all()
    assert abs((second.window > 1).mean() - 0.1) < 0.02
    assert (first.solarise == 256).all()
    assert abs((second.solarise == 128).mean() - 0.2) < 0.02
    blurred = first.sigma
    assert stats.kstest(blurred, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    untouched = np.isclose(first.matrix, np.eye(3), atol=1e-6).all(axis=(1, 2))
    assert abs(untouched.mean() - 0.2 * 0.8) < 0.02
    # Rows of the colour map sum to brightness x contrast, each uniform in [0.6, 1.4] when jittered.
    gain = first.matrix[~untouched].sum(axis=2)
    assert gain.min() > 0.6**2 - 1e-3
    assert gain.max() < 1.4**2 + 1e-3


@pytest.mark.parametrize(
    ("flip", "vflip", "rotate90"),
    [(0.3, 0.0, 0.0), (0.0, 0.4, 0.0), (0.0, 0.0, 0.6), (0.3, 0.4, 0.6), (0.5, 0.5, 0.75)],
)
def test_orientations_are_as_likely_as_their_flips_and_rotations(flip, vflip, rotate90):
    """Against the law of doing one after the other to pixels, all outcomes with their probabilities."""
    square = np.arange(4).reshape(2, 2)
    law: dict[bytes, float] = {}
    for mirror, upside, angle in product((0, 1), (0, 1), range(4)):
        seen = np.rot90(square[:: 1 - 2 * upside, :: 1 - 2 * mirror], angle).tobytes()
        chance = (flip if mirror else 1 - flip) * (vflip if upside else 1 - vflip)
        law[seen] = law.get(seen, 0.0) + chance * (rotate90 / 3 if angle else 1 - rotate90)
    view = View(size=8, flip=flip, vflip=vflip, rotate90=rotate90)
    drawn = full_plan(np.arange(N), [view, view])
    told = zip(drawn.flipped.ravel().tolist(), drawn.rotated.ravel().tolist(), strict=True)
    counts = Counter(
        np.rot90(square[:, ::-1] if mirror else square, angle).tobytes() for mirror, angle in told
    )
    assert set(counts) == {seen for seen, chance in law.items() if chance > 0.0}
    expected = [2 * N * law[seen] for seen in counts]
    assert stats.chisquare(list(counts.values()), expected).pvalue > 1e-3
    # Whatever the orientation, the crops are those of views without.
    assert np.array_equal(drawn.crops, full_plan(np.arange(N), [View(size=8)] * 2).crops)


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.14)])
def test_a_crop_inside_a_view_follows_the_law_of_an_image_of_that_size(scale):
    n, size = REFERENCES, np.array([300, 400])
    outer, inner = View(size=8, crop="centre", centre_share=0.5), View(size=8, scale=scale, within=0)
    one = np.ones(n, np.float32)
    samples = plan.Samples(np.arange(n), np.tile(size, (n, 1)), np.tile([0, 0, 1, 1], (n, 1)), one, one > 0)
    crops = plan.draw([outer, inner], samples, samples, seed=1, epoch=0).crops
    pixels = (crops * np.tile(size, 2)).round()
    assert (pixels[:, 0] == [75, 125, 225, 275]).all()
    assert_same_law(pixels[:, 1] - [75, 125, 75, 125], rectangles(View(size=8, scale=scale), (150, 150)))


@pytest.mark.parametrize(
    ("views", "told"),
    [
        ([View(size=8, within=0)], "View 0 has within 0, which is not an earlier view"),
        ([View(size=8), View(size=8, twin_of=2)], "View 1 has twin_of 2, which is not an earlier view"),
        ([View(size=8), View(size=8, within=-1)], "View 1 has within -1, which is not an earlier view"),
        ([View(size=8, partner=True), View(size=8, within=0)], "give both the same partner"),
        ([View(size=8, blur=0.5), View(size=8, twin_of=0, blur=0.5)], "give size and twin_of alone"),
    ],
)
def test_views_that_do_not_fit_each_other_are_refused(views, told):
    with pytest.raises(ValueError, match=told):
        complete(views)


def test_one_of_several_regions_is_picked_in_proportion_to_its_weight():
    n = 30_000
    boxes = np.zeros((n, 3, 4), np.float32)
    boxes[:] = np.array([[0, 0, 0.1, 0.1], [0, 0, 0.2, 0.2], [0, 0, 0.3, 0.3]], np.float32)
    weights = np.tile(np.array([1.0, 0.0, 3.0], np.float32), (n, 1))
    picked, chosen = pick_region(boxes, weights, rng.keys(0, 0, np.arange(n)))
    assert abs((picked[:, 2] > 0.25).mean() - 0.75) < 0.02
    assert not np.isclose(picked[:, 2], 0.2).any()
    assert np.array_equal(chosen, np.where(picked[:, 2] > 0.25, 3.0, 1.0))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"size": 0}, "size"),
        ({"crop": "corner"}, "corner"),
        ({"flip": 1.5}, "flip"),
        ({"vflip": -0.5}, "vflip"),
        ({"rotate90": 90}, "rotate90 is a probability"),
        ({"within": 0, "crop": "contrastive"}, "crop 'contrastive' is about the image"),
        ({"within": 0, "joint": 1.0}, "joint 1.0 is about the image"),
        ({"hue": 0.7}, "hue"),
        ({"scale": (0.5, 1.2)}, "scale"),
        ({"alpha": 0.0}, "alpha"),
        ({"brightness": -1.0}, "brightness"),
        ({"sigma": (0.0, 2.0)}, "sigma"),
        ({"crop": "inside", "dilate": 0.5}, "dilate enlarges the box, so it is at least 1"),
        ({"crop": "inside", "dilate": math.nan}, "dilate"),
        ({"crop": "random", "dilate": 1.5}, "dilate 1.5 enlarges a box that crop 'random' ignores"),
        ({"joint": 11.0}, "joint"),
        ({"crop": "whole", "joint": 0.0}, "crop 'whole' has a fixed one"),
    ],
)
def test_a_view_that_makes_no_sense_is_refused_by_name(change, word):
    with pytest.raises(ValueError, match=word):
        View(**{"size": 32, **change})
