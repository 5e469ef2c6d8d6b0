"""Any guide with any method, fifteen steps on generated scenes: exact resumes; and what each guide writes.

No curve is stored: processors and versions of PyTorch round differently, and twenty steps amplify that to
several per cent. `test_losses.py` compares each loss with its paper's formula.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise_images
from runs import copied_at, lines_of

from dali_views import Batch, RegionTable, SampleIndex
from dali_views.maps import boxes_from_maps
from dali_views.tools.scenes import make_scenes
from trainers import config as cfg
from trainers.config import file as config_file
from trainers.data import training_loader
from trainers.encoders.frozen import frozen_encoder
from trainers.engine import checkpoint
from trainers.engine.setting import join
from trainers.evaluate.evaluator import seen_maps
from trainers.guides import build_guide
from trainers.guides.encoder_maps import EncoderMaps, Located
from trainers.guides.fixed_boxes import TrueBoxes
from trainers.guides.guide import Guide, Training
from trainers.guides.reading import WIDE, write
from trainers.guides.saliency import Saliency
from trainers.guides.semantic_pairs import PARTNERS, SemanticPairs
from trainers.methods import method_of
from trainers.pretrain import pretrain
from trainers.report.report import Collapse

TWO_VIEWS = {"name": "simclr", "size": 32, "crop": "contrastive", "blur": 0}
MILD = {**TWO_VIEWS, "name": "moco_v2", "scale": [0.6, 1]}
MULTI_CROP = {
    **TWO_VIEWS, "name": "dino", "scale": [0.25, 1], "locals": 2, "local_size": 16,
    "local_scale": [0.05, 0.25],
}  # fmt: skip
SMALL = {"hidden_dim": 64, "output_dim": 32}
DINO = {
    **SMALL, "bottleneck_dim": 16, "output_dim": 64, "bn": True, "momentum": 0.99, "freeze_last_layer": 0.25,
}  # fmt: skip
LAYERS = {"layer_bottleneck": 16, "layer_hidden": 64, "layer_output": 32}
MOCO = {"queue": 16, "momentum": 0.9, "split_bn": 2, "bn": True}
# Method, views, and a learning rate at which twenty steps of so small a network show progress.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "simclr": ({"name": "simclr", **SMALL, "temperature": 0.2}, TWO_VIEWS, 0.01),
    "moco": ({"name": "moco", **SMALL, **MOCO, "temperature": 0.1}, MILD, 0.05),
    "byol": ({"name": "byol", **SMALL, "momentum": 0.9}, TWO_VIEWS, 0.05),
    "simsiam": ({"name": "simsiam", **SMALL, "predictor_dim": 16}, TWO_VIEWS, 0.5),
    "dino": ({"name": "dino", **DINO}, MULTI_CROP, 0.05),
    "scfs": ({"name": "scfs", **DINO, **LAYERS}, MULTI_CROP, 0.05),
    "lejepa": ({"name": "lejepa", **SMALL}, MULTI_CROP, 0.05),
}
FIRST = {"moco": 1}  # step from which on the queue holds keys, and not the noise it started with
TIMES = {"warmup": 1, "interval": 1, "size": 64, "threshold": 0.5, "skip_whole": False}
PRINCIPAL = {"map": "principal", "threshold": "otsu", "layer": "layer2"}
GUIDES: dict[str, dict[str, Any]] = {
    "contrastive_crop": {"name": "contrastive_crop", **TIMES},
    "online_crop": {"name": "online_crop", **TIMES, "layer": "layer2"},
    "averaged": {"name": "contrastive_crop", **TIMES, "warmup": 0, "rate": 0.5},
    "online, first": {"name": "online_crop", **TIMES, "warmup": 0, "layer": "layer2"},
    "frozen_boxes": {"name": "frozen_boxes", "layer": "layer3", "size": 64, "skip_whole": False},
    "shuffled": {"name": "contrastive_crop", **TIMES, "control": "shuffled"},
    "matched": {"name": "saliency", **TIMES, "control": "matched", "regions": 2},
    "simccrop": {"name": "simccrop"},
    "true_boxes": {"name": "true_boxes"},
    "principal": {"name": "contrastive_crop", **TIMES, **PRINCIPAL},
    "saliency": {"name": "saliency", **TIMES, "map": "gradient", "layer": "layer3", "regions": 2},
    "semantic_pairs": {"name": "semantic_pairs", "control": "label"},
}  # fmt: skip
# Two guides at once.
GUIDES["pairs, online"] = {**GUIDES["semantic_pairs"], "boxes": GUIDES["online_crop"]}
GUIDES["added pairs, online"] = GUIDES["pairs, online"]
GUIDES["pairs, salient"] = {**GUIDES["semantic_pairs"], "boxes": GUIDES["saliency"]}
# Other settings of a guide that is itself run with every method.
SETTINGS = {"averaged", "online, first", "shuffled", "matched", "principal"}
# Quick are each method with one guide and each guide with one method.
PAIRS = [
    pytest.param(*pair, marks=[] if "contrastive_crop" in pair or "simclr" in pair else pytest.mark.slow)
    for pair in product(GUIDES, METHODS)
    if pair[0] not in SETTINGS or pair[1] == "simclr"
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    images, instances = make_scenes(tmp_path_factory.mktemp("scenes"), 80, size=48)
    return {"kind": "coco", "path": str(images), "instances": str(instances), "val_share": 0}


@pytest.fixture(scope="module")
def index(scenes: dict[str, Any]) -> SampleIndex:
    return SampleIndex.from_coco(scenes["path"], scenes["instances"], progress=False)


def config_of(
    guide: str, scenes: dict[str, Any], out: Path, *changes: str, method: str = "simclr"
) -> cfg.Config:
    """A run of five steps an epoch into `out`, guided from the second epoch on."""
    keys, views, rate = METHODS[method]
    if "pairs" in guide:
        partner = "add" if "added" in guide else "replace"
        views = {**views, "partner": partner, "crop": "contrastive" if "," in guide else "random"}
    run = {"out": str(out), "epochs": 3, "evaluate_every": 0, "log_every": 1, "device": "cpu", "threads": 1}
    tree = {
        "run": run, "data": scenes, "views": views, "model": {"backbone": "test_resnet"}, "method": keys,
        "guide": GUIDES[guide], "optim": {"name": "sgd", "lr": rate, "lr_scaling": False, "batch": 16},
    }  # fmt: skip
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(tree))
    return config_file.load(file, changes)


def logged(run: Path, key: str = "loss") -> list[Any]:
    return [line[key] for line in lines_of(run) if key in line]


@pytest.mark.parametrize(("guide", "method"), PAIRS)
@pytest.mark.filterwarnings("ignore:more than half of the boxes")
def test_any_guide_works_with_any_method_and_resumes_in_mid_epoch_to_the_very_same_run(
    guide: str, method: str, scenes: dict[str, Any], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    length = f"run.epochs={4 if guide == 'contrastive_crop' else 3}"
    with copied_at(8, parts):
        pretrain(config_of(guide, scenes, whole, length, "run.checkpoint_every=8", method=method))
    losses = logged(whole)
    assert len(losses) == 5 * int(length[-1])
    assert np.isfinite(losses).all()
    assert checkpoint.load(parts)["step"] == 8
    pretrain(config_of(guide, scenes, parts, length, method=method), resume=True)
    assert logged(parts) == losses
    one, other = checkpoint.load(whole), checkpoint.load(parts)
    assert all(torch.equal(one["method"][key], other["method"][key]) for key in one["method"])
    regions = one["regions"]
    for column in ("boxes", "weights", "partner"):
        assert torch.equal(regions[column], other["regions"][column])
    if guide == "contrastive_crop":
        first = FIRST.get(method, 0)
        assert np.mean(losses[-5:]) < np.mean(losses[first : first + 5])
        assert min(logged(whole, "embedding_std")) > Collapse.least_spread
        assert min(logged(whole, "embedding_rank")) > Collapse.least_rank
    if "pairs" in guide:
        assert (regions["partner"] != torch.arange(80)).any()
        told = json.loads((whole / PARTNERS).read_text())
        assert told["pairs"] > 0
        assert told["precision"] == 1, "partners by label are of one class"
    if guide == "simccrop":
        assert (regions["boxes"] == torch.tensor([0.25, 0.25, 0.75, 0.75])).all()
    if guide != "semantic_pairs":
        assert regions["written"].all()
        assert (regions["boxes"] != torch.tensor([0.0, 0.0, 1.0, 1.0])).any()


def test_saliency_weighs_losses_from_its_first_map_on_and_its_health_is_logged(
    scenes: dict[str, Any], tmp_path: Path
) -> None:
    pretrain(config_of("saliency", scenes, tmp_path / "weighted"))
    pretrain(config_of("saliency", scenes, tmp_path / "alike", "guide.temperature=null"))
    weighted, alike = (logged(tmp_path / name) for name in ("weighted", "alike"))
    assert alike[:5] == weighted[:5], "before the first map all weights are 1"
    assert alike[5:] != weighted[5:]
    health = [line for line in lines_of(tmp_path / "weighted") if "guide_area_median" in line]
    assert [line["epoch"] for line in health] == [1, 2]
    assert "guide_moved" not in health[0], "before the first boxes there is nothing to move from"
    assert 0 <= health[1]["guide_moved"] <= 1
    assert all(0 < line["guide_area_low"] <= line["guide_area_median"] <= 1 for line in health)
    assert all(0 <= line["guide_weight_entropy"] <= 1 for line in health)


def test_true_boxes_are_the_largest_of_each_image_and_score_so_in_the_log(
    scenes: dict[str, Any], index: SampleIndex, tmp_path: Path
) -> None:
    pretrain(config_of("true_boxes", scenes, tmp_path / "run", "run.max_steps=1"))
    regions = checkpoint.load(tmp_path / "run")["regions"]
    for row in range(80):
        true = torch.from_numpy(index.truth(row))
        areas = (true[:, 2:] - true[:, :2]).prod(1)
        torch.testing.assert_close(regions["boxes"][row, 0], true[areas.argmax()])
    assert lines_of(tmp_path / "run")[0]["guide_iou"] == 1.0


def training_of(config: cfg.Config, index: SampleIndex) -> Training:
    return Training(method_of(config), index, config.views, join(config), Path(config.run.out))


def begun(config: cfg.Config, index: SampleIndex) -> RegionTable:
    """The table after the first pass of a guide."""
    regions = RegionTable(len(index), config.regions)
    build_guide(config.guide, training_of(config, index)).begin(regions)
    return regions


def test_frozen_boxes_of_a_run_are_those_of_its_encoder_and_stay_while_another_trains(
    scenes: dict[str, Any], index: SampleIndex, tmp_path: Path
) -> None:
    pretrain(config_of("simccrop", scenes, tmp_path / "past"))
    here = [f"guide.encoder={tmp_path / 'past'}", "guide.threshold=0.5"]
    config = config_of("frozen_boxes", scenes, tmp_path / "run", *here)
    pretrain(config)
    kept = checkpoint.load(tmp_path / "run")["regions"]
    assert (kept["writes"] == 1).all()
    encoder, _ = frozen_encoder(config.views, tmp_path / "past", torch.device("cpu"))
    maps = EncoderMaps(join(config), config.views, config.guide).whole(encoder, index, "activation")
    assert torch.equal(kept["boxes"][:, 0], boxes_from_maps(maps, 0.5, (64, 64), "part"))
    several = begun(config_of("frozen_boxes", scenes, tmp_path / "more", "guide.regions=3"), index)
    assert several.boxes.shape == (80, 3, 4)
    assert (several.weights > 0).sum(1).max() > 1


def test_a_whole_image_does_not_replace_a_box_unless_published_behaviour_is_asked_for(
    scenes: dict[str, Any], index: SampleIndex, tmp_path: Path
) -> None:
    box = np.array([[0.1, 0.2, 0.5, 0.6]] * 80, np.float32)
    for skip, left in (("true", box), ("false", np.array([0, 0, 1, 1], np.float32))):
        config = config_of(
            "averaged", scenes, tmp_path / skip, f"guide.skip_whole={skip}", "guide.threshold=0"
        )
        regions = RegionTable(80)
        regions.update(range(80), box)
        with (
            pytest.warns(UserWarning, match="more than half of the boxes")
            if skip == "false"
            else nullcontext()
        ):
            build_guide(config.guide, training_of(config, index)).begin(regions)
        areas = np.prod(regions.boxes[:, 0, 2:] - regions.boxes[:, 0, :2], axis=1)
        assert (areas <= WIDE).all() == (skip == "true")
        assert (regions.boxes[:, 0] == left).all(1).mean() > 0.5


@pytest.mark.parametrize(("threshold", "wrong"), [(0.01, "over 90%"), (0.9, "less than 3.1%")])
def test_a_guide_whose_boxes_are_whole_images_or_less_than_a_cell_names_a_threshold_that_helps(
    scenes: dict[str, Any], index: SampleIndex, tmp_path: Path, threshold: float, wrong: str
) -> None:
    fine = "guide.layer=layer2"  # 8 x 8 cells
    config = config_of("averaged", scenes, tmp_path / "useless", f"guide.threshold={threshold}", fine)
    with pytest.warns(UserWarning, match=rf"half.*{wrong}.*guide\.threshold=0\.\d gives") as told:
        begun(config, index)
    advice = re.search(r"guide\.threshold=[\d.]+", str(told[-1].message)).group()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begun(config_of("averaged", scenes, tmp_path / "mended", advice, fine), index)


@pytest.mark.parametrize("how", [cfg.ContrastiveCrop(), cfg.ContrastiveCrop(reading="part"), cfg.Saliency()])
def test_boxes_are_read_when_the_device_has_the_next_maps_to_compute(how: cfg.Read) -> None:
    regions, written = RegionTable(12, getattr(how, "regions", 1)), []
    maps = torch.rand(12, 4, 4, generator=torch.Generator().manual_seed(0))

    def parts() -> Iterator[Located]:
        for rows in torch.arange(12).split(4):
            written.append(int(regions.writes.sum()))  # the device is given the next part
            yield Located(rows, maps[rows])

    write(regions, parts(), how.model_copy(update={"skip_whole": False}), (8, 8))
    assert written == [0, 0, 4]
    assert (regions.writes == 1).all()
    alone = RegionTable(12, regions.regions)
    write(alone, [Located(torch.arange(12), maps)], how.model_copy(update={"skip_whole": False}), (8, 8))
    assert np.array_equal(regions.boxes, alone.boxes)


def test_the_momentum_network_looks_where_there_is_one(
    scenes: dict[str, Any], index: SampleIndex, tmp_path: Path
) -> None:
    there = ["guide.network=momentum"]
    for method in ("moco", "byol", "dino"):
        config = config_of("averaged", scenes, tmp_path / method, *there, method=method)
        training = training_of(config, index)
        slow = training.method.momentum_encoder
        torch.nn.init.zeros_(slow.net.conv1.weight if hasattr(slow, "net") else next(slow.parameters()))
        regions = RegionTable(80)
        build_guide(config.guide, training).begin(regions)
        one, other = RegionTable(80), config_file.override(config, ["guide.network=encoder"])
        build_guide(other.guide, training).begin(one)
        assert np.array_equal(one.boxes, regions.boxes) == (method == "dino")  # whose encoder is the teacher
    with pytest.raises(ValueError, match="SimCLR has no momentum network"):
        begun(config_of("averaged", scenes, tmp_path / "none", *there), index)


def test_controls_take_boxes_to_other_images_or_other_places(
    scenes: dict[str, Any], index: SampleIndex, tmp_path: Path
) -> None:
    tables = {
        control: begun(config_of("true_boxes", scenes, tmp_path / control, f"guide.control={control}"), index)
        for control in ("none", "shuffled", "matched")
    }
    true, shuffled, matched = (table.boxes[:, 0] for table in tables.values())
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, true.tolist())), "the same boxes"
    assert (shuffled != true).any(1).all(), "none where it was"
    np.testing.assert_allclose(matched[:, 2:] - matched[:, :2], true[:, 2:] - true[:, :2], atol=1e-6)
    assert ((matched >= 0) & (matched <= 1)).all()
    assert (matched != true).any(1).mean() > 0.9


@pytest.mark.filterwarnings("ignore:more than half of the boxes")
def test_maps_that_a_controlled_guide_has_kept_are_found_in_its_checkpoint(
    scenes: dict[str, Any], index: SampleIndex, tmp_path: Path
) -> None:
    config = config_of("online, first", scenes, tmp_path / "run", "guide.control=shuffled")
    guide = build_guide(config.guide, training_of(config, index))
    guide.begin(RegionTable(80))
    found = seen_maps(config.box_guide, {"guide": guide.state_dict()}, 80)
    assert found is not None
    assert found.maps.isfinite().all()


def test_a_control_pairs_the_images_that_the_encoder_pairs_and_a_band_without_pairs_is_told(
    scenes: dict[str, Any], index: SampleIndex, tmp_path: Path
) -> None:
    pretrain(config_of("simccrop", scenes, tmp_path / "past", "run.max_steps=1"))
    encoder = [f"guide.encoder={tmp_path / 'past'}", "guide.share=1.0"]

    def partners(*changes: str) -> torch.Tensor:
        config = config_of("semantic_pairs", scenes, tmp_path / "pairs", *encoder, *changes)
        regions, training = RegionTable(len(index)), training_of(config, index)
        training.out.mkdir(exist_ok=True)
        SemanticPairs(config.guide, training, Guide(None, training)).begin(regions)
        return torch.from_numpy(regions.partner.copy())

    itself = torch.arange(len(index))
    band = ["guide.band_kind=quantile", "guide.band=[0.8, 0.98]"]
    found = partners("guide.control=none", *band)
    assert 0 < (found != itself).sum() < len(index)
    random = partners("guide.control=random", *band)
    assert torch.equal(random != itself, found != itself)
    assert not torch.equal(random, found)
    with pytest.raises(ValueError, match=r"no image has a partner of similarity 0\.5 to 0\.5001.*quantile"):
        partners("guide.control=none", "guide.band=[0.5, 0.5001]")


def test_added_pairs_are_those_with_a_partner_beside_all_ordinary_ones(
    scenes: dict[str, Any], index: SampleIndex, tmp_path: Path
) -> None:
    config = config_of("added pairs, online", scenes, tmp_path / "run")
    training, regions = training_of(config, index), RegionTable(len(index))
    training.out.mkdir()
    guide = build_guide(config.guide, training)
    guide.begin(regions)
    batch = next(iter(training_loader(training.setting, config.views, index, regions)))

    def network(views: list[torch.Tensor], kin: torch.Tensor | None) -> torch.Tensor:
        first, second = views
        return (first * second).mean(dim=(1, 2, 3))

    first, second, partner = batch.views
    paired = batch.partner != batch.index
    assert paired.any()
    assert not paired.all()
    expected = network([first, second], None) + network([first, partner], None) * paired
    torch.testing.assert_close(guide.losses(network, batch), expected)


def test_pairing_anew_is_no_pass_of_the_guide_for_boxes(scenes: dict[str, Any], tmp_path: Path) -> None:
    late = ["guide.boxes.warmup=2", "guide.boxes.interval=2"]
    for name, passes, changes in (("pairs, salient", [2], late), ("semantic_pairs", [], [])):
        run = tmp_path / name
        pretrain(config_of(name, scenes, run, *changes))
        assert [line["epoch"] for line in lines_of(run) if "guide_area_median" in line] == passes
        assert [line["epoch"] for line in lines_of(run) if "guide_paired" in line] == [0, *passes]
        boxes = run / "history" / "boxes.jsonl"
        kept = boxes.read_text().splitlines() if boxes.exists() else []
        assert [json.loads(line)["epoch"] for line in kept] == passes


def test_true_boxes_of_data_without_any_are_refused_with_the_key_to_set(
    scenes: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of("simccrop", scenes, tmp_path / "out")
    none = SampleIndex.from_folder(noise_images(tmp_path / "photos", 4), progress=False, cache=False)
    with pytest.raises(ValueError, match=r"needs true boxes; name them by data\.boxes"):
        TrueBoxes(cfg.TrueBoxes(), training_of(config, none))


def test_a_pair_is_scored_by_the_map_of_each_image_that_a_view_was_cut_from(
    scenes: dict[str, Any], index: SampleIndex, tmp_path: Path
) -> None:
    config = config_of("pairs, salient", scenes, tmp_path / "out")
    assert isinstance(config.box_guide, cfg.Saliency)
    guide = Saliency(config.box_guide, training_of(config, index))
    guide.maps.maps[:] = 1.0
    guide.maps.maps[1, :, :8] = 0.0  # half of image 1 is salient, all of the others
    guide.passes = 1
    rows = torch.tensor([0, 2])
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 2, 4)
    batch = Batch(
        views=[], index=rows, label=rows, crops=whole, flipped=torch.zeros(2, 2, dtype=torch.bool),
        rotated=torch.zeros(2, 2, dtype=torch.uint8), boxes=whole[:, 0], weights=torch.ones(2),
        partner=torch.tensor([1, 2]), shapes=torch.zeros(2, 2, 2, dtype=torch.int32),
    )  # fmt: skip
    # Scores 1 x 0.5 and 1 x 1 at temperature 0.5: exp(1) and exp(2) over their mean.
    expected = torch.tensor([1.0, 2.0]).exp()
    torch.testing.assert_close(guide.weights(batch), expected / expected.mean())
