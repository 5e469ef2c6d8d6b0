"""A run that starts from given weights: where they may be, what is refused, and what stays frozen."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from mutations import Trap
from runs import once, scenes_in, weights, write_config
from safetensors.torch import save, save_file
from torch import Tensor

from trainers import cli
from trainers import config as cfg
from trainers.config import file as config_file
from trainers.encoders.backbones import build_backbone, freeze
from trainers.encoders.weights import load_weights
from trainers.engine import checkpoint
from trainers.engine.optim import build_optimizer, set_lr
from trainers.methods import method_of
from trainers.pretrain import pretrain

METHODS: dict[str, dict[str, Any]] = {
    "simclr": {},
    "moco": {"queue": 64, "split_bn": 2},
    "byol": {"hidden_dim": 32, "output_dim": 16},
    "dino": {"hidden_dim": 16, "bottleneck_dim": 8, "output_dim": 16, "momentum": 0.5},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> dict[str, str]:
    return scenes_in(once(tmp_path_factory, "weights_scenes", scenes_in))


def config_in(folder: Path, data: dict[str, str], method: str, *overrides: str, **changes: Any) -> cfg.Config:
    run = {"epochs": 1, "evaluate_every": 1, "checkpoint_every": 0}
    views = {"size": 16, "blur": 0, **({"name": "dino", "locals": 0} if method == "dino" else {})}
    tree = {
        "views": views,
        "guide": {"name": "none"},
        "method": {"name": method, **METHODS[method]},
        **changes,
    }
    knn = {"k": 5, "temperature": 0.1}  # by default the method's
    return config_file.load(write_config(folder, data, run=run, knn=knn, **tree), overrides)


def test_online_and_momentum_network_get_the_weights_and_heads_stay_as_they_are(scenes, tmp_path):
    state = torchvision.models.resnet18(num_classes=3).state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    for name in METHODS:
        method = method_of(config_in(tmp_path, scenes, name, "model.backbone=resnet18"))
        before, drawn = (
            {key: each.clone() for key, each in method.state_dict().items()},
            torch.get_rng_state(),
        )
        method.start_from(str(tmp_path / "resnet18.pth"))
        assert torch.equal(torch.get_rng_state(), drawn)
        for key, each in method.state_dict().items():
            net, _, rest = key.partition(".")
            assert torch.equal(each, state[rest] if net.endswith("backbone") else before[key]), (name, key)


@pytest.mark.parametrize(("first", "second"), [("dino", "moco"), ("moco", "byol"), ("simclr", "dino")])
def test_a_run_starts_at_the_knn_of_the_run_whose_weights_it_takes(first, second, scenes, tmp_path, capsys):
    past, now = (tmp_path / name / "run" for name in ("past", "now"))
    end = pretrain(config_in(past.parent, scenes, first, "optim.lr=0.01")).scores["epoch 1"]["knn_top1"]
    source = past if second == "moco" else past / "last.pt"
    begin, go_on = (
        config_in(now.parent, scenes, second, f"model.weights={source}", f"run.max_steps={steps}")
        for steps in (1, 2)
    )
    assert pretrain(begin).scores["given weights"]["knn_top1"] == end
    assert cli.main(["knn", str(now), "--encoder", "untrained"]) == 0
    told = capsys.readouterr().out
    assert f"top-1 {end:.2%}" in told
    assert f"encoder of the weights that were given ({source})" in told
    shutil.rmtree(past)  # a run that has begun needs them no more
    assert pretrain(go_on, resume=True).step == 2


def renamed(state: dict[str, Tensor], prefix: str, plus: int = 0) -> dict[str, Tensor]:
    return {f"{prefix}{name}": each + plus for name, each in state.items()}


@pytest.mark.parametrize(
    ("library", "name", "head"),
    [("torchvision", "shufflenet_v2_x0_5", 9), ("timm", "test_resnet", 9), ("timm", "test_vit", 1000)],
)
def test_state_dicts_of_libraries_and_usual_projects_are_read_with_or_without_a_head(
    library, name, head, tmp_path
):
    make = torchvision.models.get_model if library == "torchvision" else timm.create_model
    state = make(name, num_classes=head).state_dict()
    own, file = build_backbone(name).state_dict().keys(), str(tmp_path / "weights.safetensors")
    save_file(state, file)
    sources = [file, f"{library}:{name}:{file}"]
    for number, each in enumerate((state, {key: state[key] for key in own})):
        keys = renamed(each, "module.encoder_k.", plus=1) | renamed(each, "module.encoder_q.")
        contents = {
            "bare": each,
            "moco": {"epoch": 3, "state_dict": keys | {"module.queue": torch.zeros(2)}},
            "dino": {"student": renamed(each, "module.backbone.", 1), "teacher": renamed(each, "backbone.")},
            "lightning": {"state_dict": renamed(each, "model._orig_mod."), "hyper_parameters": {"lr": 1}},
        }
        for project, content in contents.items():
            sources.append(f"{tmp_path}/{project}{number}.pth")
            torch.save(content, sources[-1])
    for source in sources:
        encoder = build_backbone(name)
        load_weights(encoder, source)
        assert all(torch.equal(state[key], each) for key, each in encoder.state_dict().items()), source


def test_what_does_not_fit_and_hostile_files_are_a_sentence_and_never_executed(scenes, tmp_path, capsys):
    state, trap = build_backbone("resnet10").state_dict(), tmp_path / "executed"
    endless: dict[str, Any] = {}
    endless["model"] = endless
    contents = {
        "its first convolution is 3x3, that of this encoder 7x7; set model.stem":
            {**state, "conv1.weight": torch.zeros(64, 3, 3, 3)},
        "60 missing (conv1.weight, bn1.weight, bn1.bias, ...), 78 unexpected (cls_token, pos_embed, ":
            build_backbone("test_vit").state_dict(),
        "no state dict but conv1.weight": {**state, "bn1.weight": torch.zeros(64).to_sparse()},
        "no state dict but 1;": {1: torch.zeros(1)},
        "no state dict but method;": {"model": {"method": 3}},
        "no state dict but ;": {},
        "no state dict but model;": endless,
        "more than tensors, lists, dicts, text and numbers": {**state, "more": Trap(trap)},
    }  # fmt: skip
    header = b'{"a":{"dtype":"F32","shape":[4000000000,4000000000],"data_offsets":[0,9]}}'
    files = [
        ("cut.safetensors", save(state)[:-99], "cannot be read as weights alone"),
        ("page.safetensors", b"<!DOCTYPE html><html>404</html>", "cannot be read as weights alone"),
        ("long.safetensors", (2**62).to_bytes(8, "little") + b"{" * 99, "cannot be read as weights alone"),
        (
            "wide.safetensors",
            (90).to_bytes(8, "little") + header.ljust(99),
            "cannot be read as weights alone",
        ),
        ("page.pth", b"<!DOCTYPE html><html>404</html>", "cannot be read as weights alone"),
        ("empty.pth", b"", "cannot be read as weights alone"),
    ]
    for number, (words, content) in enumerate(contents.items()):
        torch.save(content, tmp_path / f"{number}.pth")
        files.append((f"{number}.pth", (tmp_path / f"{number}.pth").read_bytes(), words))
    files.append(("cut.pth", files[6][1][:-999], "cannot be read as weights alone"))
    for name, data, _ in files:
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    config_in(tmp_path, scenes, "simclr")
    absent = [("folder", b"", "no checkpoint"), ("absent.pth", b"", "no file of weights")]
    for name, _, words in files + absent:
        source = f"model.weights={tmp_path}/{name}"
        assert cli.main(["pretrain", str(tmp_path / "config.yaml"), source]) == 2, name
        told = capsys.readouterr().err
        assert words in told
        assert name in told
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "frozen", "free"),
    [
        ("test_resnet", "conv1 bn1 layer1", "layer2 layer3 layer4"),
        ("convnext_tiny", "features.0 features.1", "features.2 features.3 features.7"),
        ("test_convnext", "stem stages.0", "stages.1 stages.3 head"),
        ("test_vit", "cls_token pos_embed patch_embed blocks.0", "blocks.1 blocks.5 norm"),
        ("vit_b_32", "class_token conv_proj encoder.pos_embedding encoder.layers.encoder_layer_0",
         "encoder.layers.encoder_layer_1 encoder.ln"),
    ],
)  # fmt: skip
def test_the_first_stage_has_what_lies_before_it_and_nothing_behind_it(name, frozen, free):
    net = build_backbone(name)
    freeze(net, 1)
    net.eval().train()
    for part in (*frozen.split(), *free.split()):
        learns, modules = part in free.split(), dict(net.named_modules())
        inside = [key for key in modules if f"{key}.".startswith(f"{part}.")]
        assert {modules[key].training for key in inside} <= {learns}
        found = {p.requires_grad for key, p in net.named_parameters() if f"{key}.".startswith(f"{part}.")}
        assert found == {learns}, part
    assert net.training
    with pytest.raises(ValueError, match=r"frozen_stages 99 is more than the \d+ stages"):
        freeze(net, 99)


@pytest.mark.parametrize("method", ["moco", "dino"])
def test_frozen_stages_stay_bit_for_bit_have_no_state_and_resume(method, scenes, tmp_path):
    changes: dict[str, Any] = {
        "model": {"backbone": "resnet10", "frozen_stages": 2},
        "optim": {"name": "adamw", "lr": 0.01, "batch": 16, "backbone_lr_factor": 0.1},
    }
    for folder, steps in (("whole", 3), ("parts", 1), ("parts", 3)):
        config = config_in(tmp_path / folder, scenes, method, f"run.max_steps={steps}", **changes)
        pretrain(config, resume=True)
    found, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(found[key], parts[key]) for key in found)
    torch.manual_seed(config.run.seed)
    fresh = method_of(config)
    fresh.freeze(2)
    for key, each in fresh.state_dict().items():
        net, _, rest = key.partition(".")
        if net.endswith("backbone") and not key.endswith("num_batches_tracked"):
            frozen = rest.startswith(("conv1.", "bn1.", "layer1.", "layer2."))
            assert torch.equal(each, found[key]) == frozen, key
    state = checkpoint.load(tmp_path / "whole" / "run")["optimizer"]["state"]
    # DINO's last layer gets no gradient in the first epoch.
    assert len(state) == sum(each.requires_grad for each in fresh.parameters()) - (method == "dino")


def test_the_encoders_rate_is_a_multiple_of_the_heads(scenes, tmp_path):
    steps = []
    for factor in (1.0, 0.25):
        torch.manual_seed(0)
        method = method_of(config_in(tmp_path, scenes, "simclr"))
        before = {key: each.detach().clone() for key, each in method.named_parameters()}
        optimizer = build_optimizer(method, cfg.SGD(lr=1.0, backbone_lr_factor=factor))
        set_lr(optimizer, 0.5, peak=1.0)
        for each in method.parameters():
            each.grad = torch.ones_like(each)
        optimizer.step()
        steps.append({key: each.detach() - before[key] for key, each in method.named_parameters()})
    for key, step in steps[0].items():
        share = 0.25 if key.startswith("backbone.") else 1.0
        torch.testing.assert_close(steps[1][key], share * step, atol=1e-6, rtol=1e-5)
