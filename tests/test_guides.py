"""Any guide with any method, twenty steps on generated scenes; and what each guide writes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise_images
from runs import copied_at
from test_curves import METHODS, configuration, curve, scenes_of

from dali_views import Batch, RegionTable, SampleIndex
from trainers import config as cfg
from trainers.config import file as config_file
from trainers.engine import checkpoint
from trainers.engine.setting import join
from trainers.guides.fixed_boxes import TrueBoxes
from trainers.guides.guide import Guide, Training
from trainers.guides.saliency import Saliency
from trainers.guides.semantic_pairs import PARTNERS, SemanticPairs
from trainers.methods import method_of
from trainers.pretrain import pretrain

TIMES = {"warmup": 1, "interval": 1, "size": 64}
# fmt: off
GUIDES: dict[str, dict[str, Any]] = {
    "online_crop": {"name": "online_crop", **TIMES, "threshold": 0.5, "layer": "layer2"},
    "simccrop": {"name": "simccrop"},
    "true_boxes": {"name": "true_boxes"},
    "principal": {
        "name": "contrastive_crop",
        **TIMES,
        "map": "principal",
        "threshold": "otsu",
        "layer": "layer2",
    },
    "saliency": {"name": "saliency", **TIMES, "map": "gradient", "layer": "layer3", "regions": 2},
    "semantic_pairs": {"name": "semantic_pairs", "control": "label"},
}
# fmt: on
ONLINE_PAIRS = {**GUIDES["semantic_pairs"], "boxes": GUIDES["online_crop"]}
SALIENT_PAIRS = {**GUIDES["semantic_pairs"], "boxes": GUIDES["saliency"]}
PAIRS = list(product(GUIDES, METHODS))
# Two guides at once, with one method of each kind: all images of a step in one batch, and apart.
GUIDES |= {"pairs, online": ONLINE_PAIRS, "pairs, salient": SALIENT_PAIRS}
PAIRS += product(("pairs, online", "pairs, salient"), ("simclr", "byol"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return scenes_of(tmp_path_factory.mktemp("scenes"))


def training_of(config: cfg.Config, index: SampleIndex) -> Training:
    return Training(method_of(config), index, config.views, join(config), Path(config.run.out))


def file_of(guide: str, method: str, scenes: dict[str, Any], out: Path) -> Path:
    out.mkdir()
    more: dict[str, Any] = {}
    if "pairs" in guide:
        more = {"partner": True, "crop": "contrastive" if "," in guide else "random"}
    return configuration(method, scenes, out, GUIDES[guide], **more)


@pytest.mark.parametrize(("guide", "method"), PAIRS)
@pytest.mark.filterwarnings("ignore:half of the boxes")
def test_any_guide_works_with_any_method_and_resumes_in_mid_epoch_to_the_very_same_run(
    guide: str, method: str, scenes: dict[str, Any], tmp_path: Path
) -> None:
    whole, parts = (file_of(guide, method, scenes, tmp_path / name) for name in ("whole", "parts"))
    with copied_at(8, tmp_path / "parts" / "run"):
        pretrain(config_file.load(whole, ["run.epochs=3", "run.checkpoint_every=8"]))
    losses = curve(tmp_path / "whole")
    assert len(losses) == 15
    assert np.isfinite(losses).all()
    assert checkpoint.load(tmp_path / "parts" / "run")["step"] == 8
    pretrain(config_file.load(parts, ["run.epochs=3"]), resume=True)
    assert curve(tmp_path / "parts") == losses
    one, other = (checkpoint.load(tmp_path / name / "run") for name in ("whole", "parts"))
    assert all(torch.equal(one["method"][key], other["method"][key]) for key in one["method"])
    for column in ("boxes", "weights", "partner"):
        assert torch.equal(one["regions"][column], other["regions"][column])
    regions = one["regions"]
    if "pairs" in guide:
        assert (regions["partner"] != torch.arange(80)).any()
        told = json.loads((tmp_path / "whole" / "run" / PARTNERS).read_text())
        assert told["pairs"] > 0
        assert told["precision"] == 1, "partners by label are of one class"
    if guide != "semantic_pairs":
        assert regions["written"].all()
        assert (regions["boxes"] != torch.tensor([0.0, 0.0, 1.0, 1.0])).any()


def test_the_health_of_a_guide_stands_in_the_log(scenes: dict[str, Any], tmp_path: Path) -> None:
    pretrain(config_file.load(file_of("saliency", "simclr", scenes, tmp_path / "out")))
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    health = [line for line in lines if "guide_area_median" in line]
    assert [line["epoch"] for line in health] == [1, 2, 3]
    assert "guide_moved" not in health[0], "before the first boxes there is nothing to move from"
    assert all(0 <= line["guide_moved"] <= 1 for line in health[1:])
    assert all(0 < line["guide_area_low"] <= line["guide_area_median"] <= 1 for line in health)
    assert all(0 <= line["guide_weight_entropy"] <= 1 for line in health)


def test_infinite_temperature_is_the_unweighted_run_bit_for_bit(
    scenes: dict[str, Any], tmp_path: Path
) -> None:
    curves = {}
    for name, change in (("weighted", []), ("alike", ["guide.temperature=null"])):
        file = file_of("saliency", "simclr", scenes, tmp_path / name)
        pretrain(config_file.load(file, change))
        curves[name] = curve(tmp_path / name)
    # The same boxes without weights: one region per image and no map but for its boxes.
    assert curves["alike"][:5] == curves["weighted"][:5], "before the first map all weights are 1"
    assert curves["alike"][5:] != curves["weighted"][5:]


def test_true_boxes_are_the_largest_of_each_image_and_score_so_in_the_log(
    scenes: dict[str, Any], tmp_path: Path
) -> None:
    pretrain(config_file.load(file_of("true_boxes", "simclr", scenes, tmp_path / "out"), ["run.max_steps=1"]))
    regions = checkpoint.load(tmp_path / "out" / "run")["regions"]
    index = SampleIndex.from_coco(scenes["path"], scenes["instances"], progress=False)
    for row in range(80):
        true = torch.from_numpy(index.truth(row))
        areas = (true[:, 2:] - true[:, :2]).prod(1)
        torch.testing.assert_close(regions["boxes"][row, 0], true[areas.argmax()])
    first = (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["guide_iou"] == 1.0


def test_a_control_pairs_the_images_that_the_encoder_pairs_and_a_band_without_pairs_is_told(
    scenes: dict[str, Any], tmp_path: Path
) -> None:
    past = file_of("simccrop", "simclr", scenes, tmp_path / "past")
    pretrain(config_file.load(past, ["run.max_steps=1"]))
    file = file_of("semantic_pairs", "simclr", scenes, tmp_path / "pairs")
    index = SampleIndex.from_coco(scenes["path"], scenes["instances"], progress=False)
    encoder = [f"guide.encoder={tmp_path / 'past' / 'run'}", "guide.share=1.0"]

    def partners(*changes: str) -> torch.Tensor:
        config = config_file.load(file, [*encoder, *changes])
        regions = RegionTable(len(index))
        (tmp_path / "pairs" / "run").mkdir(exist_ok=True)
        training = training_of(config, index)
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


def test_pairing_anew_is_no_pass_of_the_guide_for_boxes(scenes: dict[str, Any], tmp_path: Path) -> None:
    for name, guide, passes in (("boxes", "pairs, salient", [2]), ("alone", "semantic_pairs", [])):
        file = file_of(guide, "simclr", scenes, tmp_path / name)
        late = ["guide.boxes.warmup=2", "guide.boxes.interval=2"] if passes else []
        pretrain(config_file.load(file, ["run.epochs=4", *late]))
        noted = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in noted]
        assert [line["epoch"] for line in lines if "guide_area_median" in line] == passes
        assert [line["epoch"] for line in lines if "guide_paired" in line] == [0, *passes]
        boxes = tmp_path / name / "run" / "history" / "boxes.jsonl"
        kept = boxes.read_text().splitlines() if boxes.exists() else []
        assert [json.loads(line)["epoch"] for line in kept] == passes


def test_true_boxes_of_data_without_any_are_refused_with_the_key_to_set(
    scenes: dict[str, Any], tmp_path: Path
) -> None:
    config = config_file.load(file_of("simccrop", "simclr", scenes, tmp_path / "out"))
    index = SampleIndex.from_folder(noise_images(tmp_path / "photos", 4), progress=False, cache=False)
    with pytest.raises(ValueError, match=r"needs true boxes; name them by data\.boxes"):
        TrueBoxes(cfg.TrueBoxes(), training_of(config, index))


def test_a_pair_is_scored_by_the_map_of_each_image_that_a_view_was_cut_from(
    scenes: dict[str, Any], tmp_path: Path
) -> None:
    config = config_file.load(file_of("pairs, salient", "simclr", scenes, tmp_path / "out"))
    index = SampleIndex.from_coco(scenes["path"], scenes["instances"], progress=False)
    assert isinstance(config.box_guide, cfg.Saliency)
    guide = Saliency(config.box_guide, training_of(config, index))
    guide.maps.maps[:] = 1.0
    guide.maps.maps[1, :, :7] = 0.0  # half of image 1 is salient, all of the others
    guide.passes = 1
    rows = torch.tensor([0, 2])
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 2, 4)
    batch = Batch(
        views=[], index=rows, label=rows, crops=whole, flipped=torch.zeros(2, 2, dtype=torch.bool),
        boxes=whole[:, 0], weights=torch.ones(2), partner=torch.tensor([1, 2]),
    )  # fmt: skip
    # Scores 1 x 0.5 and 1 x 1 at temperature 0.5: exp(1) and exp(2) over their mean.
    expected = torch.tensor([1.0, 2.0]).exp()
    torch.testing.assert_close(guide.weights(batch), expected / expected.mean())
