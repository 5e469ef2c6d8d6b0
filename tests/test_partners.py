"""Partners against loops in float64, on one rank and two; their controls, their precision, their encoders."""

from __future__ import annotations

import math
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from safetensors.torch import save_file
from scipy.stats import chisquare
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from dali_views import SampleIndex
from dali_views.scenes import make_scenes
from trainers import checkpoint, config_file, partners
from trainers import config as cfg
from trainers.backbones import Backbone, build_backbone
from trainers.data import evaluation_views, plain_loader
from trainers.methods import method_of
from trainers.partners import (
    embed,
    find_partners,
    frozen_encoder,
    label_partners,
    precision,
    random_partners,
)

CPU = torch.device("cpu")
BANDS: list[tuple[Any, tuple[float, float]]] = [
    ("absolute", (0.2, 0.9)), ("absolute", (-1, 1)), ("quantile", (0.5, 0.9)), ("quantile", (0.9, 1)),
]  # fmt: skip


def features_of(n: int, dim: int = 6, seed: int = 0) -> Tensor:
    """Features of any length around a few centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, dim, generator=generator)
    noise = torch.randn(n, dim, generator=generator)
    return 3 * (centres[torch.randint(5, (n,), generator=generator)] + 0.7 * noise)


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()))


def plain_search(
    features: Tensor, kind: str, band: tuple[float, float], anchors: list[int]
) -> tuple[list[int], list[float]]:
    """Partner and cosine of every image, by comparing everything with everything."""
    n = len(features)
    if kind == "quantile":
        every = [cosine(features[i], features[j]) for i, j in combinations(range(n), 2)]
        low, high = np.quantile(every, band)
    else:
        low, high = band
    partner, similarity = list(range(n)), [math.nan] * n
    for i in anchors:
        found = [(cosine(features[i], features[j]), -j) for j in range(n) if j != i]
        inside = [pair for pair in found if low - 1e-6 <= pair[0] <= high + 1e-6]
        if inside:
            similarity[i], partner[i] = max(inside)[0], -max(inside)[1]
    return partner, similarity


@pytest.mark.parametrize("chunk", [1, 7, 30])
@pytest.mark.parametrize(("kind", "band"), BANDS)
def test_partners_are_those_of_a_plain_loop_in_tiles_of_any_size(kind, band, chunk):
    features = features_of(30)
    found = find_partners(features, band=band, kind=kind, chunk=chunk, progress=False)
    partner, similarity = plain_search(features, kind, band, list(range(30)))
    assert found.partner.tolist() == partner
    assert found.partner.dtype == torch.int64
    assert found.cosine.dtype == torch.float32
    torch.testing.assert_close(found.cosine, torch.tensor(similarity), atol=1e-6, rtol=0, equal_nan=True)
    inside = found.cosine[found.partner != torch.arange(30)]
    assert len(inside) > 10
    assert ((inside >= found.band[0] - 1e-6) & (inside <= found.band[1] + 1e-6)).all()


def test_only_anchors_get_partners_and_who_has_none_in_the_band_stays_alone():
    features = features_of(30)
    anchors = torch.tensor([4, 29, 0, 11])
    found = find_partners(features, band=(-1, 1), anchors=anchors, progress=False)
    partner, _ = plain_search(features, "absolute", (-1, 1), anchors.tolist())
    assert found.partner.tolist() == partner
    assert (found.partner != torch.arange(30)).sum() == 4
    assert found.cosine.isnan().sum() == 26
    orthogonal = find_partners(torch.eye(4), band=(0.5, 1), progress=False)
    assert orthogonal.partner.tolist() == [0, 1, 2, 3]
    assert orthogonal.cosine.isnan().all()
    nobody = find_partners(features, band=(-1, 1), anchors=torch.arange(0), progress=False)
    assert nobody.partner.tolist() == list(range(30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exact_duplicates_of_any_scale_fall_out_by_the_upper_bound_alone(dtype):
    features = features_of(40)
    copied = torch.cat([features, 0.37 * features]).to(dtype)
    rows = torch.arange(80)
    duplicate = (rows + 40) % 80
    # Only where nothing else is as near.
    free = find_partners(copied, band=(-1, 1), progress=False)
    bound = find_partners(copied, band=(-1, 0.9995), progress=False)
    assert torch.equal(free.partner, duplicate)
    assert (free.cosine <= 1).all()
    assert ((bound.partner != duplicate) & (bound.partner != rows)).all()
    assert (bound.cosine <= 0.9995).all()


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_of_equally_similar_images_the_first_is_taken(chunk):
    a, b = [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, -0.5]  # exact in float32, cosine 0.5
    found = find_partners(torch.tensor([b, a, a, b, a, b, b, a]), band=(-1, 0.9), chunk=chunk, progress=False)
    assert found.partner.tolist() == [1, 0, 0, 1, 0, 1, 1, 0]
    assert found.cosine.tolist() == [0.5] * 8


def test_half_precision_finds_partners_as_similar_as_full_precision():
    features = torch.nn.functional.normalize(features_of(200, dim=64), dim=1)
    full = find_partners(features, band=(-1, 1), progress=False)
    half = find_partners(features.half(), band=(-1, 1), progress=False)
    for i in range(200):
        by_full, by_half = (cosine(features[i], features[found.partner[i]]) for found in (full, half))
        assert by_half == pytest.approx(by_full, abs=2e-3)
        assert float(half.cosine[i]) == pytest.approx(by_half, abs=2e-3)
    assert (full.partner == half.partner).float().mean() > 0.95


def test_a_row_of_zeros_has_no_partner_and_is_nobodys():
    features = -features_of(12).abs()
    features[::2] *= -1  # the cosine of an even and an odd row is negative, of a row of zeros it would be 0
    features[3] = 0
    found = find_partners(features, band=(-1, 0.1), progress=False)
    assert found.partner[3] == 3
    assert not (found.partner == 3)[[0, 1, 2, *range(4, 12)]].any()
    exact = find_partners(features, band=(0.5, 1), kind="quantile", progress=False)
    rest = find_partners(features[[0, 1, 2, *range(4, 12)]], band=(0.5, 1), kind="quantile", progress=False)
    assert exact.band[0] == pytest.approx(rest.band[0])


def test_quantiles_from_a_sample_of_pairs_are_near_those_of_all_and_hang_on_the_seed_alone():
    features = features_of(300)
    every, again, other = (
        find_partners(features, band=(0.1, 0.99), kind="quantile", pairs=pairs, seed=seed, progress=False)
        for pairs, seed in ((10**6, 0), (20_000, 1), (20_000, 2))
    )
    assert (
        again.band
        == find_partners(
            features, band=(0.1, 0.99), kind="quantile", pairs=20_000, seed=1, chunk=50, progress=False
        ).band
    )
    assert again.band != other.band
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    cosines = (unit @ unit.T)[tuple(torch.triu_indices(300, 300, 1))]
    for found in (again, other):
        shares = [float((cosines <= bound).double().mean()) for bound in found.band]
        # Five deviations of a share of 20,000.
        assert shares == [pytest.approx(0.1, abs=0.0107), pytest.approx(0.99, abs=0.0036)]
    assert [float((cosines <= b).double().mean()) for b in every.band] == pytest.approx([0.1, 0.99], abs=1e-4)
    assert find_partners(features, band=(0, 1), kind="quantile", progress=False).band == (-1, 1)


def test_a_quantile_that_the_pairs_cannot_resolve_is_refused_with_the_number_needed():
    features = features_of(500)
    with pytest.raises(ValueError, match=r"0\.9999 .* 5000 pairs .* raise pairs to 100000,"):
        find_partners(features, band=(0.5, 0.9999), kind="quantile", pairs=5000, progress=False)
    resolved = find_partners(features, band=(0.5, 0.9999), kind="quantile", pairs=100_000, progress=False)
    assert resolved.band[1] > resolved.band[0]
    with pytest.raises(ValueError, match=r"0\.99999 .* 5000 pairs .* nearer 0\.5"):  # of 124,750
        find_partners(features, band=(0.5, 0.99999), kind="quantile", pairs=5000, progress=False)
    with pytest.raises(ValueError, match=r"0\.01 .* 435 pairs .* nearer 0\.5"):
        find_partners(features[:30], band=(0.01, 0.5), kind="quantile", progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"band": (0.9, 0.5)}, "low < high"),
        ({"band": (0.5, 0.5)}, "low < high"),
        ({"band": (-1.1, 0.5)}, "-1 <= low"),
        ({"band": (0.5, math.nan)}, "low < high"),
        ({"band": (-0.1, 0.5), "kind": "quantile"}, "0 <= low"),
        ({"band": (0.1, 1.5), "kind": "quantile"}, "high <= 1"),
        ({"kind": "share"}, "absolute or quantile"),
        ({"features": torch.ones(1, 3)}, "at least 2 images"),
        ({"features": torch.ones(3)}, "at least 2 images"),
        ({"features": torch.tensor([[1.0, 2], [3, math.inf]])}, "not finite"),
        ({"features": torch.tensor([[1.0, 2], [3, math.nan]])}, "not finite"),
        ({"anchors": torch.tensor([0, 30])}, "rows of 30 images"),
        ({"anchors": torch.tensor([-1])}, "rows of 30 images"),
        ({"anchors": torch.ones(30, dtype=torch.bool)}, "row numbers"),
        ({"features": torch.zeros(9, 2), "kind": "quantile", "band": (0.4, 0.6)}, "all features are zeros"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes, message):
    arguments = {"features": features_of(30), "band": (0.1, 0.9), "progress": False, **changes}
    with pytest.raises(ValueError, match=message):
        find_partners(arguments.pop("features"), **arguments)


def test_a_tile_of_the_default_size_fits_its_budget_and_a_small_one_is_still_a_tile():
    for budget, dim in ((2**30, 2048), (2**30, 512), (2**20, 2048), (10**5, 64)):
        side = partners._tile(budget, dim)
        assert 7 * side**2 + 16 * side * dim <= budget < 7 * (side + 1) ** 2 + 16 * (side + 1) * dim
    found = find_partners(features_of(5), band=(-1, 1), budget=1, progress=False)
    assert found.partner.tolist() == plain_search(features_of(5), "absolute", (-1, 1), list(range(5)))[0]


# -- controls and precision -------------------------------------------------------------------------


def test_random_partners_are_all_others_with_equal_probability():
    n, seeds = 8, 1400
    drawn = torch.stack([random_partners(n, seed) for seed in range(seeds)])
    assert not (drawn == torch.arange(n)).any()
    for row in range(n):
        counts = torch.bincount(drawn[:, row], minlength=n)
        others = counts[torch.arange(n) != row]
        assert counts[row] == 0
        assert chisquare(others.numpy()).pvalue > 1e-4
    assert random_partners(2, 5).tolist() == [1, 0]


def test_partners_of_the_same_label_are_all_of_them_with_equal_probability():
    labels = torch.tensor([3, 7, 3, -1, 3, 9, 7, 3, -1, 3])
    drawn = torch.stack([label_partners(labels, seed) for seed in range(1400)])
    assert (labels[drawn] == labels).all()
    assert (drawn[:, [3, 5, 8]] == torch.tensor([3, 5, 8])).all()  # unknown, or the only one
    assert drawn[0, [1, 6]].tolist() == [6, 1]
    for row in (0, 2, 4, 7, 9):
        counts = torch.bincount(drawn[:, row], minlength=10)
        others = [i for i in (0, 2, 4, 7, 9) if i != row]
        assert counts.sum() == counts[others].sum()
        assert chisquare(counts[others].numpy()).pvalue > 1e-4


def test_controls_are_functions_of_the_seed_and_the_same_for_an_anchor_whoever_else_is_one():
    labels = np.arange(500, dtype=np.int32) % 9
    anchors = torch.tensor([8, 499, 3])
    rest = torch.ones(500, dtype=torch.bool).index_fill(0, anchors, False)
    for control in (lambda *a: random_partners(500, *a), lambda *a: label_partners(labels, *a)):
        whole, some = control(11), control(11, anchors)
        assert torch.equal(whole, control(11))
        assert (whole != control(12)).float().mean() > 0.9
        assert torch.equal(some[anchors], whole[anchors])
        assert torch.equal(some[rest], torch.arange(500)[rest])
    with pytest.raises(ValueError, match="at least 2"):
        random_partners(1, 0)
    with pytest.raises(ValueError, match="rows of 500"):
        label_partners(labels, 0, torch.tensor([500]))


def test_precision_as_worked_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, -1, 2])
    partner = torch.tensor([1, 3, 2, 4, 3, 0, 5])  # 2 is alone, 5 and the partner of 6 are unknown
    cosines = torch.tensor([0.9, 0.2, math.nan, 0.7, 0.8, 0.5, 0.6])
    found = precision(partner, labels, cosines, bands=2)
    assert found["pairs"] == 4
    assert found["precision"] == pytest.approx(3 / 4)  # all but 1 -> 3
    # Of the 5 others whose label is known, 2 share that of 0 and of 1; 1 shares that of 3 and of 4.
    assert found["chance"] == pytest.approx((2 / 5 + 2 / 5 + 1 / 5 + 1 / 5) / 4)
    low, high = found["bands"]
    assert low == {
        "low": pytest.approx(0.2), "high": pytest.approx(0.7), "precision": 0.5, "pairs": 2,
    }  # fmt: skip
    assert high == {"low": pytest.approx(0.8), "high": pytest.approx(0.9), "precision": 1.0, "pairs": 2}
    assert "bands" not in precision(partner, labels)
    deciles = precision(partner, labels, cosines)["bands"]
    assert [band["pairs"] for band in deciles] == [1] * 4 + [0] * 6
    assert math.isnan(deciles[-1]["precision"])


def test_precision_of_nothing_is_no_number_and_random_partners_are_at_chance():
    alone = precision(torch.arange(3), torch.tensor([0, 0, 1]), torch.full((3,), math.nan))
    assert alone["pairs"] == 0
    assert math.isnan(alone["precision"])
    assert math.isnan(alone["chance"])
    assert len(alone["bands"]) == 10
    assert precision(torch.tensor([1, 0]), np.full(2, -1))["pairs"] == 0
    labels = torch.arange(20_000) % 4
    found = precision(random_partners(20_000, 0), labels)
    assert found["chance"] == pytest.approx(4999 / 19_999)
    assert found["precision"] == pytest.approx(found["chance"], abs=5 * math.sqrt(0.25 * 0.75 / 20_000))
    assert precision(label_partners(labels, 0), labels)["precision"] == 1
    with pytest.raises(ValueError, match="same images"):
        precision(torch.arange(3), torch.zeros(2))


# -- encoders and features ----------------------------------------------------------------------------


def config_of(folder: Path, size: int = 32, **views: Any) -> cfg.Config:
    return cfg.Config(
        run=cfg.Run(out=str(folder), device="cpu", threads=1),
        data=cfg.Data(kind="folder", path=str(folder)),
        views=cfg.Views(size=size, **views),
        model=cfg.Model(backbone="resnet10"),
        method=cfg.SimCLR(),
    )


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_scenes(tmp_path_factory.mktemp("scenes"), 24, size=48)


@pytest.fixture(scope="module")
def index(scenes: tuple[Path, Path]) -> SampleIndex:
    return SampleIndex.from_coco(*scenes, cache=False, progress=False)


@pytest.fixture(scope="module")
def encoder() -> Backbone:
    torch.manual_seed(0)
    return build_backbone("resnet10")


def test_features_are_the_encoders_own_as_unit_rows_in_the_order_of_the_index(index, encoder, tmp_path):
    config = config_of(tmp_path)
    encoder.train()
    found = embed(config, encoder, index, CPU)
    assert encoder.training
    encoder.eval()
    with torch.no_grad():
        views = [b.views[0] for b in plain_loader(config, index, evaluation_views(config.views))]
        direct = torch.nn.functional.normalize(encoder(torch.cat(views)), dim=1)
    assert found.dtype == torch.float16
    assert found.shape == (24, encoder.dim)
    torch.testing.assert_close(found, direct.half(), atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(found.float().norm(dim=1), torch.ones(24), atol=1e-3, rtol=0)
    order = np.random.default_rng(0).permutation(24)
    shuffled = embed(config, encoder, index.subset(order), CPU)
    torch.testing.assert_close(shuffled, found[torch.from_numpy(order)], atol=1e-3, rtol=1e-2)
    assert not torch.allclose(shuffled, found, atol=1e-3, rtol=1e-2)


def test_features_come_in_parts_and_are_the_same(encoder, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (600, 16, 16, 3), dtype=np.uint8)
    index = SampleIndex.from_arrays(pixels)
    config = config_of(tmp_path, size=16)
    whole = embed(config, encoder, index, CPU)
    monkeypatch.setattr(partners, "_PART", 256)  # three parts of one batch instead of one of three
    assert torch.equal(embed(config, encoder, index, CPU), whole)
    assert (whole.float().norm(dim=1) > 0.99).all()


def test_an_image_that_cannot_be_read_has_a_row_of_zeros_and_no_partner(scenes, encoder, tmp_path):
    images = Path(shutil.copytree(scenes[0], tmp_path / "images"))
    index = SampleIndex.from_folder(images, cache=False, progress=False)
    Path(index.path(5)).unlink()
    with pytest.warns(UserWarning, match="000005"):
        features = embed(config_of(tmp_path), encoder, index, CPU)
    assert (features[5] == 0).all()
    assert (features[torch.arange(24) != 5].float().norm(dim=1) > 0.99).all()
    found = find_partners(features, band=(-1, 1), progress=False).partner
    assert (found == 5).nonzero().flatten().tolist() == [5]


def test_the_encoder_of_a_run_is_frozen_and_embeds_with_the_views_of_that_run(index, tmp_path):
    past = config_of(tmp_path / "past", size=24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    torch.manual_seed(3)
    method = method_of(past)
    state = {"config": config_file.dump(past), "step": 0, "method": method.state_dict()}
    checkpoint.save(tmp_path / "past", state)
    now = config_of(tmp_path / "now", size=32, blur=0.0)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    found, like = frozen_encoder(now, str(tmp_path / "past"), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    changed = {"size": 24, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    assert like == now.model_copy(update={"views": now.views.model_copy(update=changed)})
    torch.testing.assert_close(
        embed(like, found, index, CPU), embed(past, method.encoder, index, CPU), atol=1e-3, rtol=1e-2
    )
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        frozen_encoder(now, tmp_path / "nowhere", CPU)


def test_torchvisions_weights_are_taken_from_its_cache_and_never_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = config_of(tmp_path, mean=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match=r"not on this machine; fetch them once.*get_model"):
        frozen_encoder(config, "torchvision:shufflenet_v2_x0_5", CPU)
    assert list(tmp_path.iterdir()) == []
    model = torchvision.models.get_model("shufflenet_v2_x0_5").eval()
    url = torchvision.models.get_model_weights("shufflenet_v2_x0_5").DEFAULT.url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / url.rpartition("/")[2])
    found, like = frozen_encoder(config, "torchvision:shufflenet_v2_x0_5", CPU)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.fc(found(images)), model(images))
    assert (like.views.size, like.views.mean) == (224, (0.485, 0.456, 0.406))
    with pytest.raises(ValueError, match="no pretrained encoder 'resnet10'"):
        frozen_encoder(config, "torchvision:resnet10", CPU)


def test_timms_weights_are_taken_from_its_cache_and_never_fetched(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = config_of(tmp_path)
    with pytest.raises(ValueError, match=r"not on this machine; fetch them once.*create_model"):
        frozen_encoder(config, "timm:test_resnet", CPU)
    with pytest.raises(ValueError, match="not on this machine"):
        frozen_encoder(config, "timm:legacy_seresnet18.in1k", CPU)
    model = timm.create_model("test_resnet").eval()
    cached = tmp_path / "models--timm--test_resnet.r160_in1k"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(model.state_dict(), cached / "snapshots" / ("0" * 40) / "model.safetensors")
    found, like = frozen_encoder(config, "timm:test_resnet", CPU)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.fc(found(images)), model(images))
    assert (like.views.size, like.views.mean, like.views.std) == (160, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="no pretrained encoder 'nothing'"):
        frozen_encoder(config, "timm:nothing", CPU)


# -- two ranks -----------------------------------------------------------------------------------------


def searches(images: Path, instances: Path, folder: Path) -> dict[str, Any]:
    """What all ranks must agree on, each time in another way of sharing out."""
    torch.manual_seed(0)
    encoder = build_backbone("resnet10")
    index = SampleIndex.from_coco(images, instances, cache=False, progress=False)
    found: dict[str, Any] = {"embed": embed(config_of(folder), encoder, index, CPU)}
    for number, (kind, band) in enumerate(BANDS):
        found[f"all {number}"] = find_partners(features_of(31), band=band, kind=kind, progress=False)
    for name, anchors in (("some", [30, 2, 17]), ("one", [9]), ("none", [])):
        rows = torch.tensor(anchors, dtype=torch.long)
        found[name] = find_partners(features_of(31), band=(-1, 1), anchors=rows, chunk=4, progress=False)
    found["sample"] = find_partners(
        features_of(100), band=(0.2, 0.9), kind="quantile", pairs=1001, progress=False
    )
    return {name: list(each) if isinstance(each, tuple) else each for name, each in found.items()}


def search_on_one_rank(rank: int, images: Path, instances: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(searches(images, instances, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_find_the_same_as_one_and_as_each_other(scenes, tmp_path):
    spawn(search_on_one_rank, args=(*scenes, tmp_path), nprocs=2)
    alone = searches(*scenes, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for rank in ranks:
        torch.testing.assert_close(rank.pop("embed"), alone["embed"], atol=1e-3, rtol=1e-2)
    del alone["embed"]
    for name, (partner, similarity, band) in alone.items():
        for rank in ranks:
            assert torch.equal(rank[name][0], partner), name
            torch.testing.assert_close(rank[name][1], similarity, atol=1e-6, rtol=0, equal_nan=True)
            assert rank[name][2] == pytest.approx(band, abs=1e-6)
    assert [rank["some"][0].tolist() for rank in ranks] == [alone["some"][0].tolist()] * 2
