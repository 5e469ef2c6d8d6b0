"""Export: what another library makes of the file is the encoder that was trained."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from trainers import config as cfg
from trainers.config import file as config_file
from trainers.encoders.backbones import Backbone, build_backbone
from trainers.engine import checkpoint
from trainers.export import TOLERANCE, export, write
from trainers.methods import build_method

PAGE = Path(__file__).resolve().parents[1] / "docs" / "export.md"


@torch.no_grad()
def scramble(network: nn.Module) -> None:
    """Every tensor a random one: fresh layer scales, biases and statistics are alike, so swaps hide."""
    torch.manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif name.endswith(("running_mean", "bias")):
            tensor.uniform_(-0.2, 0.2)
        elif tensor.squeeze().ndim < 2:  # scales and variances
            tensor.uniform_(0.5, 1.5)
        else:
            bound = tensor[0].numel() ** -0.5
            tensor.uniform_(-bound, bound)


def write_run(folder: Path, backbone: str, size: int = 32, stem: str = "imagenet") -> Backbone:
    """A checkpoint as a run leaves it, though of random weights; its encoder."""
    config = cfg.Config(
        run=cfg.Run(out=str(folder)),
        data=cfg.Data(kind="folder", path="photos"),
        views=cfg.Views(size=size),
        model=cfg.Model(backbone=backbone, stem=stem),
        method=cfg.SimCLR(hidden_dim=0, output_dim=2),
    )
    with torch.device("meta"):  # saves the time of an initialisation that is overwritten
        method = build_method(config.method, build_backbone(backbone, stem))
    scramble(method.to_empty(device="cpu"))
    # As the loop leaves them: convolutions lie in memory channel by channel last.
    method.to(memory_format=torch.channels_last)
    state = {"config": config_file.dump(config), "step": 7, "method": method.state_dict(), "guide": {}}
    checkpoint.save(folder, state)
    return method.encoder.eval()


@torch.inference_mode()
def features(network: nn.Module, size: int) -> Tensor:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return network.eval()(images)


def torchvision_network(name: str) -> nn.Module:
    if name == "resnet10":
        network = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    else:
        network = torchvision.models.get_model(name, weights=None)
    network.set_submodule("classifier.2" if name.startswith("convnext") else "fc", nn.Identity())
    return network


def timm_network(name: str) -> nn.Module:
    if name == "resnet10":
        return timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=0)
    return timm.create_model(name, num_classes=0)


@pytest.mark.parametrize(
    ("backbone", "library", "stem"),
    [
        ("resnet10", "torchvision", "small"),
        ("resnet10", "timm", "small"),
        ("resnet18.a1_in1k", "torchvision", "imagenet"),
        ("convnext_tiny", "torchvision", "imagenet"),
    ],
)
def test_a_librarys_own_network_computes_the_trained_features_from_the_file(
    tmp_path, backbone, library, stem
):
    size, architecture = 64, backbone.partition(".")[0]
    encoder = write_run(tmp_path / "run", backbone, size, stem)
    result = export(tmp_path / "run", tmp_path / "files" / "out.safetensors", library)
    (file,) = (tmp_path / "files").iterdir()
    assert (result.path, result.architecture) == (file, architecture)
    assert result.tensors == len(encoder.state_dict())
    assert result.difference <= TOLERANCE
    with torch.device("meta"):
        network = timm_network(architecture) if library == "timm" else torchvision_network(architecture)
    if stem == "small":
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    network.load_state_dict(load_file(file), assign=True)
    expected, found = features(encoder, size), features(network, size)
    # Rounding apart they are equal, and not because they are the same whatever the image.
    assert (expected[0] - expected[1]).abs().max() > 20 * TOLERANCE * expected.abs().max()
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_a_transformer_trained_on_smaller_views_is_exported_with_its_own_position_embedding(tmp_path):
    encoder = write_run(tmp_path, "deit_tiny_patch16_224", size=96)
    result = export(tmp_path, tmp_path / "out.safetensors", "timm")
    assert result.difference <= TOLERANCE
    saved = load_file(result.path)
    assert torch.equal(saved["pos_embed"], encoder.state_dict()["pos_embed"])


@pytest.fixture(scope="module")
def resnets(tmp_path_factory) -> tuple[Path, Backbone]:
    """A folder with the files that the page speaks of, and the ResNet-50 in two of them."""
    folder = tmp_path_factory.mktemp("export")
    encoder = write_run(folder / "run", "resnet50")
    export(folder / "run" / checkpoint.LAST, folder / "encoder.safetensors")
    export(folder / "run", folder / "encoder-timm.safetensors", "timm")
    write_run(folder / "small", "resnet18", stem="small")
    export(folder / "small", folder / "small.safetensors")
    return folder, encoder


def test_the_file_tells_what_a_user_must_know_and_holds_batch_norms_statistics(resnets):
    folder, encoder = resnets
    with safe_open(folder / "encoder-timm.safetensors", "pt") as file:
        about = file.metadata()
    assert about.pop("version")
    assert json.loads(about.pop("mean")) == [0.485, 0.456, 0.406]
    assert json.loads(about.pop("std")) == [0.229, 0.224, 0.225]
    expected = ("timm", "resnet50", "imagenet", "simclr", "7", "32", "dali-views")
    names = ("format", "architecture", "stem", "method", "step", "size", "project")
    assert about == dict(zip(names, expected, strict=True))
    tensors, state = load_file(folder / "encoder.safetensors"), encoder.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    assert tensors["bn1.num_batches_tracked"] == 7
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in tensors.values())


@pytest.mark.parametrize(
    ("backbone", "home", "other"),
    [("mobilenet_v3_small", "torchvision", "timm"), ("resnet10t", "timm", "torchvision")],
)
def test_a_backbone_whose_tensors_one_library_has_is_exported_to_that_one(tmp_path, backbone, home, other):
    encoder = write_run(tmp_path, backbone, size=64)
    file = tmp_path / "out.safetensors"
    told = f"{backbone} can be exported to {home} only, not to {other}; give --format {home}, or train"
    with pytest.raises(ValueError, match=told):
        export(tmp_path, file, other)
    assert not file.exists()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        export(tmp_path / "nowhere", file)
    result = export(tmp_path, file, home)
    assert (result.architecture, result.tensors) == (backbone, len(encoder.state_dict()))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        # Two tensors of one shape under each other's name: a mistake that loads without a word.
        (lambda t: {"layer1.0.conv1.weight": t["layer1.0.conv2.weight"],
                    "layer1.0.conv2.weight": t["layer1.0.conv1.weight"]}, "features differ by"),
        (lambda t: {"layer4.0.bn2.running_var": torch.ones(512)}, "features differ by"),
        (lambda t: {"bn1.weight": torch.full((64,), torch.nan)}, "features differ by nan"),
        (lambda t: {"layer2.0.downsample.0.weight": None}, "Missing key"),
    ],
)  # fmt: skip
def test_a_wrong_conversion_is_noticed_and_leaves_what_was_there(
    tmp_path, harm: Callable[[dict[str, Tensor]], dict[str, Tensor | None]], words
):
    encoder, file = build_backbone("resnet10"), tmp_path / "out.safetensors"
    scramble(encoder)
    file.write_bytes(b"an older file")
    tensors = encoder.state_dict()
    tensors = {name: each for name, each in {**tensors, **harm(tensors)}.items() if each is not None}
    with pytest.raises(RuntimeError, match=words):
        write(tensors, {}, file, torchvision_network("resnet10"), encoder, 32)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"an older file"]


def test_the_pages_code_gives_the_trained_encoder_and_detectron2_its_names_and_settings(resnets, monkeypatch):
    folder, encoder = resnets
    monkeypatch.chdir(folder)
    page: dict[str, Any] = {}  # the names that the code leaves when it is run from top to bottom
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), page)
    torch.testing.assert_close(features(page["encoder"], 64), features(encoder, 64))
    back, state = torch.load(folder / "encoder.pth")["state_dict"], encoder.state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())

    saved = pickle.loads((folder / "encoder.pkl").read_bytes())["model"]
    layers = ["stem.conv1"]  # as detectron2 calls those of a ResNet-50
    for stage, count in enumerate((3, 4, 6, 3), start=2):
        layers += [f"res{stage}.{block}.conv{n}" for block in range(count) for n in (1, 2, 3)]
        layers.append(f"res{stage}.0.shortcut")
    norm = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    assert saved.keys() == {f"{layer}.{tensor}" for layer in layers for tensor in ("weight", *norm)}
    pairs = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_mean": "stem.conv1.norm.running_mean",
        "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
        "layer3.5.conv2.weight": "res4.5.conv2.weight",
        "layer4.2.bn3.running_var": "res5.2.conv3.norm.running_var",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(torch.from_numpy(saved[theirs]), state[ours]), ours

    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    detectron2, views = yaml.safe_load(text)["MODEL"], cfg.Views()
    mmdet = page["model"]["data_preprocessor"]
    assert detectron2["PIXEL_MEAN"] == mmdet["mean"] == pytest.approx([255 * x for x in views.mean])
    assert detectron2["PIXEL_STD"] == mmdet["std"] == pytest.approx([255 * x for x in views.std])
