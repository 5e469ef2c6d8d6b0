"""Any guide with any method, twenty steps on generated scenes; and what each guide writes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_curves import METHODS, STEPS, configuration, curve, scenes_of

from trainers import checkpoint, config_file
from trainers.pretrain import pretrain

TIMES = {"warmup": 1, "interval": 1, "size": 64}
GUIDES: dict[str, dict[str, Any]] = {
    "online_crop": {"name": "online_crop", **TIMES, "threshold": 0.5, "layer": "layer2"},
    "simccrop": {"name": "simccrop"},
    "saliency": {"name": "saliency", **TIMES, "map": "gradient", "layer": "layer3", "regions": 2},
    "semantic_pairs": {"name": "semantic_pairs", "control": "label"},
}
PAIRS = list(product(GUIDES, METHODS))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return scenes_of(tmp_path_factory.mktemp("scenes"))


def file_of(guide: str, method: str, scenes: dict[str, Any], out: Path) -> Path:
    out.mkdir()
    partner = guide == "semantic_pairs"
    more = {"partner": True, "crop": "random"} if partner else {}
    return configuration(method, scenes, out, GUIDES[guide], **more)


@pytest.mark.parametrize(("guide", "method"), PAIRS)
@pytest.mark.filterwarnings("ignore:half of the boxes")
def test_any_guide_works_with_any_method_and_resumes_in_mid_epoch_to_the_very_same_run(
    guide: str, method: str, scenes: dict[str, Any], tmp_path: Path
) -> None:
    whole, parts = (file_of(guide, method, scenes, tmp_path / name) for name in ("whole", "parts"))
    pretrain(config_file.load(whole))
    losses = curve(tmp_path / "whole")
    assert len(losses) == STEPS
    assert np.isfinite(losses).all()
    pretrain(config_file.load(parts, ["run.max_steps=8"]))
    pretrain(config_file.load(parts), resume=True)
    assert curve(tmp_path / "parts") == losses
    one, other = (checkpoint.load(tmp_path / name / "run") for name in ("whole", "parts"))
    assert all(torch.equal(one["method"][key], other["method"][key]) for key in one["method"])
    for column in ("boxes", "weights", "partner"):
        assert torch.equal(one["regions"][column], other["regions"][column])
    regions = one["regions"]
    if guide == "semantic_pairs":
        assert (regions["partner"] != torch.arange(80)).any()
    else:
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
