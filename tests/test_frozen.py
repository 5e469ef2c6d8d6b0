"""Frozen encoders of runs and libraries, and the features that they give of images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from mutations import Trap
from safetensors.torch import save_file

from dali_views import SampleIndex
from dali_views.tools.scenes import make_scenes
from trainers import config as cfg
from trainers.config import file as config_file
from trainers.data import evaluation_views, plain_loader
from trainers.encoders import frozen
from trainers.encoders.backbones import Backbone, build_backbone
from trainers.encoders.frozen import embed, frozen_encoder
from trainers.engine import checkpoint
from trainers.engine.setting import join
from trainers.guides.partners import find_partners
from trainers.methods import method_of

CPU = torch.device("cpu")
VIEWS = cfg.Views(size=32)


def config_of(folder: Path, size: int = 32, **views: Any) -> cfg.Config:
    return cfg.Config(
        run=cfg.Run(out=str(folder), device="cpu", threads=1),
        data=cfg.Data(kind="folder", path=str(folder)),
        views=cfg.Views(size=size, **views),
        model=cfg.Model(backbone="resnet10"),
        method=cfg.SimCLR(),
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> SampleIndex:
    images, instances = make_scenes(tmp_path_factory.mktemp("scenes"), 24, size=48)
    return SampleIndex.from_coco(images, instances, cache=False, progress=False)


@pytest.fixture(scope="module")
def encoder() -> Backbone:
    torch.manual_seed(0)
    return build_backbone("resnet10")


def test_features_are_the_encoders_own_as_unit_rows_in_the_order_of_the_index(index, encoder, tmp_path):
    config = config_of(tmp_path)
    encoder.train()
    found = embed(join(config), config.views, encoder, index)
    assert encoder.training
    encoder.eval()
    loader = plain_loader(join(config), config.views, index, evaluation_views(config.views))
    with torch.no_grad():
        direct = torch.nn.functional.normalize(encoder(torch.cat([b.views[0] for b in loader])), dim=1)
    assert found.dtype == torch.float16
    assert found.shape == (24, encoder.dim)
    torch.testing.assert_close(found, direct.half(), atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(found.float().norm(dim=1), torch.ones(24), atol=1e-3, rtol=0)
    order = np.random.default_rng(0).permutation(24)
    shuffled = embed(join(config), config.views, encoder, index.subset(order))
    torch.testing.assert_close(shuffled, found[torch.from_numpy(order)], atol=1e-3, rtol=1e-2)
    assert not torch.allclose(shuffled, found, atol=1e-3, rtol=1e-2)


def test_features_come_in_parts_and_are_the_same(encoder, tmp_path, monkeypatch):
    index = SampleIndex.from_arrays(
        np.random.default_rng(0).integers(0, 256, (600, 16, 16, 3), dtype=np.uint8)
    )
    config = config_of(tmp_path, size=16)
    whole = embed(join(config), config.views, encoder, index)
    monkeypatch.setattr(frozen, "_PART", 256)  # three parts of one batch instead of one of three
    assert torch.equal(embed(join(config), config.views, encoder, index), whole)


def test_an_image_that_cannot_be_read_has_a_row_of_zeros_and_no_partner(index, encoder, tmp_path):
    shutil.copytree(index.root, tmp_path / "images")
    index = SampleIndex.from_folder(tmp_path / "images", cache=False, progress=False)
    Path(index.path(5)).unlink()
    config = config_of(tmp_path)
    with pytest.warns(UserWarning, match="000005"):
        features = embed(join(config), config.views, encoder, index)
    assert (features[5] == 0).all()
    assert (features[torch.arange(24) != 5].float().norm(dim=1) > 0.99).all()
    found = find_partners(features, band=(-1, 1), progress=False).partner
    assert (found == 5).nonzero().flatten().tolist() == [5]


def test_the_encoder_of_a_run_is_frozen_and_embeds_with_the_views_of_that_run(index, tmp_path):
    past = config_of(tmp_path / "past", size=24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    torch.manual_seed(3)
    method = method_of(past)
    state = {"config": config_file.dump(past), "step": 0, "method": method.state_dict(), "guide": {}}
    checkpoint.save(tmp_path / "past", state)
    now = config_of(tmp_path / "now", size=32, blur=0.0)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    found, like = frozen_encoder(now.views, str(tmp_path / "past"), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    changed = {"size": 24, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    assert like == now.views.model_copy(update=changed)
    expected = embed(join(past), past.views, method.encoder, index)
    torch.testing.assert_close(embed(join(now), like, found, index), expected, atol=1e-3, rtol=1e-2)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        frozen_encoder(now.views, tmp_path / "nowhere", CPU)


LIBRARIES = {"torchvision": "shufflenet_v2_x0_5", "timm": "test_resnet"}
TRAINED_WITH = {"torchvision": (224, (0.485, 0.456, 0.406)), "timm": (160, (0.5, 0.5, 0.5))}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
every_library = pytest.mark.parametrize("library", LIBRARIES)


def library_model(library: str, **options: Any) -> torch.nn.Module:
    torch.manual_seed(7)
    if library == "torchvision":
        return torchvision.models.get_model(LIBRARIES[library], **options).eval()
    return timm.create_model(LIBRARIES[library], **options).eval()


def frozen_as(library: str, file: Path | None = None) -> Backbone:
    """The encoder of a library, with the views that its weights were trained with."""
    source = f"{library}:{LIBRARIES[library]}" + (f":{file}" if file else "")
    found, like = frozen_encoder(VIEWS, source, CPU)
    assert not found.training
    assert (like.size, like.mean) == TRAINED_WITH[library]
    return found


@every_library
def test_a_librarys_weights_are_taken_from_its_cache_and_never_fetched(library, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"not on this machine; fetch them once.*(get|create)_model"):
        frozen_as(library)
    with pytest.raises(ValueError, match="not on this machine"):
        frozen_encoder(VIEWS, "timm:legacy_seresnet18.in1k", CPU)  # of an address, not of a hub
    assert list(tmp_path.iterdir()) == []
    model = library_model(library)
    if library == "torchvision":  # as if the library had fetched these weights
        url = torchvision.models.get_model_weights(LIBRARIES[library]).DEFAULT.url
        (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
        torch.save(model.state_dict(), tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    else:
        cached, commit = tmp_path / "models--timm--test_resnet.r160_in1k", "0" * 40
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        (cached / "snapshots" / commit).mkdir(parents=True)
        save_file(model.state_dict(), cached / "snapshots" / commit / "model.safetensors")
    torch.testing.assert_close(model.fc(frozen_as(library)(IMAGES)), model(IMAGES))
    with pytest.raises(ValueError, match="no pretrained encoder 'resnet10'"):
        frozen_encoder(VIEWS, f"{library}:resnet10", CPU)


def store(state: Any, file: Path) -> Path:
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    return file


@every_library
def test_weights_come_from_a_file_whatever_head_it_holds(library, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    for classes, name in ((1000, "weights.safetensors"), (7, "weights.pth")):
        model = library_model(library, num_classes=classes)
        state = model.state_dict()
        left_out = ("fc.weight", "fc.bias", *(key for key in state if key.endswith("num_batches_tracked")))
        for each in (state, {key: value for key, value in state.items() if key not in left_out}):
            file = store(each, tmp_path / name)
            torch.testing.assert_close(model.fc(frozen_as(library, file)(IMAGES)), model(IMAGES))


@every_library
def test_a_file_of_another_network_is_refused_by_the_names_of_its_first_tensors(library, tmp_path):
    state = library_model(library).state_dict()
    first, second, *_ = state
    rest = {key: each for key, each in state.items() if key not in (first, second)}
    wrong = {
        rf"does not fit .* 2 missing \({first}, {second}\)$": rest,
        r"does not fit .* 4 unexpected \(more0, more1, more2, \.\.\.\)$":
            {**state, **{f"more{i}": torch.zeros(1) for i in range(4)}},
        rf"does not fit .* 1 of another shape \({first}\)$": {**state, first: torch.zeros(5)},
        rf"does not fit .* 1 not finite \({first}\)$": {**state, first: state[first] / 0},
        rf"does not fit .* 1 of another kind \({first}\)$": {**state, first: state[first].long()},
        r"1 missing .*, 1 unexpected": {**rest, first: state[first], "more": torch.zeros(1)},
    }  # fmt: skip
    for message, each in wrong.items():
        with pytest.raises(ValueError, match=message):
            frozen_as(library, store(each, tmp_path / "weights.safetensors"))
    with pytest.warns(UserWarning, match=rf"1 tensors in half precision \({first}\)"):
        frozen_as(library, store({**state, first: state[first].half()}, tmp_path / "weights.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"no file of weights .*absent"):
        frozen_as(library, tmp_path / "absent.pth")


def test_a_file_that_is_no_state_dict_is_refused_and_never_executed(tmp_path):
    state, trap = library_model("torchvision").state_dict(), tmp_path / "executed"
    contents = {
        "no state dict but weights, epoch; ": {"weights": state, "epoch": 3},
        "no state dict but list; ": [1, 2],
        "cannot be read as weights alone": {**state, "more": Trap(trap)},
    }
    for message, content in contents.items():
        with pytest.raises(ValueError, match=message):
            frozen_as("torchvision", store(content, tmp_path / "weights.pth"))
    assert not trap.exists()
    for name in ("weights.pth", "weights.safetensors"):
        for damaged in (b"", b"<html>not found</html>", bytes(100), b"PK\x03\x04 cut short"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match="cannot be read as weights alone"):
                frozen_as("torchvision", tmp_path / name)
