"""How boxes are best read off maps: layer, kind of map, alignment, reading and threshold, by true boxes.

python tests/bench/box_readings.py OUT.csv --run RUN --lite FILE --tiny FOLDER --coco FOLDER --objects FOLDER

RUN: a run folder of a ResNet. FILE: weights of timm's tf_efficientnet_lite0. FOLDER: Tiny-ImageNet with val/
and val_boxes.txt; COCO128 with images/ and labels/; a set of tests/bench/objects_on_photographs.py. What is
not given is left out. Scenes and untrained ResNets are made.

Thresholds: the best of 0.1 to 0.9 by true boxes, and some that need no label: 0.6; "auto" and "otsu", see
`thresholds`; "half" of the way from a map's median to its maximum, where auto goes 0.6 of it; and "mirror",
the one of 0.1 to 0.9 at which boxes of images and of mirror images agree most beyond chance: "agreement" is
their mean IoU less that with boxes of other images.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from dali_views import SampleIndex, recipes
from dali_views.maps.boxes import Reading, Threshold, boxes_from_maps
from dali_views.maps.coordinates import iou
from dali_views.maps.heatmap import activation_map, align_maps, layer_offset, principal_map, upsample
from dali_views.maps.tap import FeatureTap
from dali_views.tools.scenes import make_scenes
from trainers import config as cfg
from trainers.data import plain_loader
from trainers.encoders.backbones import Backbone, build_backbone
from trainers.encoders.frozen import frozen_encoder
from trainers.engine.setting import join
from trainers.evaluate.box_scores import THRESHOLDS, localisation, reference, spread_rows

SEEDS = 3
READ_AT = (64, 64)  # cells that maps are enlarged to before boxes are read
CPU = torch.device("cpu")
SETTING = join(
    cfg.Config(run=cfg.Run(out="none", device="cpu", threads=1), data=cfg.Data(kind="folder", path=""))
)
KINDS = {"activation": activation_map, "principal": principal_map}
LABEL_FREE = ("0.6", "auto", "half", "otsu", "mirror")


class Network(NamedTuple):
    name: str
    encoder: Backbone
    views: cfg.Views
    layers: tuple[str, ...]


class DataSet(NamedTuple):
    name: str
    images: SampleIndex
    """With true boxes."""
    size: int
    """Pixels, of the usual input."""


class Seen(NamedTuple):
    """(N, h, w) maps of images, and of their mirror images."""

    maps: Tensor
    mirrored: Tensor


def networks(given: argparse.Namespace) -> Iterator[Network]:
    for seed in range(SEEDS):
        for name in ("resnet18", "resnet10"):
            torch.manual_seed(seed)
            net = build_backbone(name)
            yield Network(f"{name} untrained {seed}", net, cfg.Views(), net.stage_layers)
        if given.run and seed == 0:
            net, views = frozen_encoder(cfg.Views(), given.run, CPU)
            yield Network("trained run", net, views, net.stage_layers)
        if given.lite and seed == 0:
            net, views = frozen_encoder(cfg.Views(), f"timm:tf_efficientnet_lite0:{given.lite}", CPU)
            yield Network("efficientnet_lite0", net, views, ("blocks.2", "blocks.4", "blocks.6"))


def data_sets(given: argparse.Namespace, made: Path) -> Iterator[DataSet]:
    small = make_scenes(made / "small", given.most, 128, share=(0.03, 0.08), objects=(1, 1))
    yield DataSet("scenes 3-8 %", SampleIndex.from_coco(*small), 128)
    large = make_scenes(made / "large", given.most, 96)
    yield DataSet("scenes 7-34 %", SampleIndex.from_coco(*large), 128)
    if given.objects:
        index = SampleIndex.from_coco(given.objects / "images", given.objects / "instances.json")
        index = index.subset(spread_rows(len(index), given.most))
        yield DataSet("objects on photographs", index, 224)
    if given.tiny:
        index = SampleIndex.from_folder(given.tiny / "val").with_boxes(given.tiny / "val_boxes.txt")
        yield DataSet("Tiny-ImageNet", index.subset(spread_rows(len(index), given.most)), 224)
    if given.coco:
        true = {f"{file.stem}.jpg": corners(file) for file in (given.coco / "labels").glob("*.txt")}
        index = SampleIndex.from_folder(given.coco / "images").with_boxes(true)
        yield DataSet("COCO128", index.subset(spread_rows(len(index), given.most)), 224)


def corners(file: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(n, 4) boxes of a label file of COCO128, whose lines are: class, centre x, y, width, height."""
    _, x, y, width, height = np.loadtxt(file, ndmin=2).T
    return np.stack([y - height / 2, x - width / 2, y + height / 2, x + width / 2], 1).clip(0, 1)


def seen_by(network: Network, data: DataSet) -> tuple[int, ...]:
    """The sizes in pixels at which a network sees a set: only what is worth its time."""
    if network.name == "efficientnet_lite0":
        return (224,)
    if network.name == "resnet18 untrained 0":
        return (128, 224) if data.size == 128 else (data.size,) * (data.name == "COCO128")
    return (data.size,) * (data.size == 128 or (network.name, data.name) == ("trained run", "COCO128"))


@torch.no_grad()
def look(network: Network, index: SampleIndex, size: int) -> dict[tuple[str, str, bool], Seen]:
    """Maps by layer, kind and whether aligned."""
    encoder = network.encoder.eval()
    parts: dict[tuple[str, str], tuple[list[Tensor], list[Tensor]]] = {}
    for batch in plain_loader(SETTING, network.views, index, recipes.localisation(size), alone=True):
        images = batch.views[0]
        for turn, shown in enumerate((images, images.flip(3))):
            with ExitStack() as stack:
                taps = [stack.enter_context(FeatureTap(encoder, layer)) for layer in network.layers]
                encoder(shown)
                for layer, tap in zip(network.layers, taps, strict=True):
                    for kind, read in KINDS.items():
                        parts.setdefault((layer, kind), ([], []))[turn].append(read(tap.features))
    result = {}
    for (layer, kind), found in parts.items():
        seen = Seen(*(torch.cat(each) for each in found))
        offset = layer_offset(encoder, images, layer)
        result[layer, kind, False] = seen
        result[layer, kind, True] = Seen(*(align_maps(each, offset) for each in seen))
    return result


def rows(seen: Seen, index: SampleIndex) -> Iterator[dict[str, object]]:
    """A row per reading of one set of maps."""
    maps, mirrored = (upsample(each, READ_AT) for each in seen)
    median, high = maps.flatten(1).median(1).values[:, None, None], maps.amax((1, 2), keepdim=True)

    for reading in cast(tuple[Reading, ...], ("extent", "part", "rectangle")):
        levels = (0.0,) if reading == "rectangle" else THRESHOLDS

        def read(maps: Tensor, level: Threshold, reading: Reading = reading) -> Tensor:
            return boxes_from_maps(maps, level, reading=reading)

        boxes = [read(maps, level) for level in levels]
        scores = [localisation(each.numpy(), index) for each in boxes]
        best = int(np.argmax([score["iou_best"] for score in scores]))
        areas = (boxes[best][:, 2:] - boxes[best][:, :2]).prod(1)
        turned = (flip_boxes(read(mirrored, level)) for level in levels)
        agreed = [beyond_chance(each, other) for each, other in zip(boxes, turned, strict=True)]
        row: dict[str, object] = {"reading": reading, "iou": scores[best]["iou_best"]}
        row |= {"corloc": scores[best]["corloc"], "whole": (areas > 0.9).float().mean().item()}
        row |= {"area": areas.median().item(), "agreement": max(agreed)}
        if reading != "rectangle":
            chosen = int(np.argmax(agreed))
            half = read(maps - (median + high) / 2, 0.0)
            found = (
                scores[THRESHOLDS.index(0.6)],
                localisation(read(maps, "auto").numpy(), index),
                localisation(half.numpy(), index),
                localisation(read(maps, "otsu").numpy(), index),
                scores[chosen],
            )
            row |= {"threshold": THRESHOLDS[best], "mirror threshold": THRESHOLDS[chosen]}
            for name, score in zip(LABEL_FREE, found, strict=True):
                row |= {f"{name} iou": score["iou_best"], f"{name} corloc": score["corloc"]}
        yield row


def flip_boxes(boxes: Tensor) -> Tensor:
    y0, x0, y1, x1 = boxes.unbind(-1)
    return torch.stack([y0, 1 - x1, y1, 1 - x0], -1)


def beyond_chance(boxes: Tensor, others: Tensor) -> float:
    """Mean IoU of boxes (N, 4) of the same images, less that of different images."""
    chance = [iou(boxes, others.roll(step, 0)).mean() for step in (1, 7, 31, 101)]
    return float(iou(boxes, others).mean() - sum(chance) / len(chance))


COLUMNS = (
    "data", "network", "size", "layer", "cells", "map", "aligned", "reading", "threshold", "iou", "corloc",
    "whole", "area", *(f"{name} {what}" for name in LABEL_FREE for what in ("iou", "corloc")),
    "mirror threshold", "agreement",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    for name in ("run", "lite", "tiny", "coco", "objects"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--most", type=int, default=100, help="images of a set")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as made, given.out.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        sets = list(data_sets(given, Path(made)))
        for data in sets:
            for name, score in reference(data.images).items():
                row = {"data": data.name, "network": f"({name} box)", "iou": score["iou_best"]}
                table.writerow(rounded(row | {"corloc": score["corloc"]}))
        for network, data in itertools.product(networks(given), sets):
            for size in seen_by(network, data):
                for (layer, kind, aligned), seen in look(network, data.images, size).items():
                    key = {"data": data.name, "network": network.name, "size": size, "layer": layer}
                    key |= {"cells": seen.maps.shape[1], "map": kind, "aligned": aligned}
                    table.writerows(rounded(key | row) for row in rows(seen, data.images))
                file.flush()
                print(network.name, data.name, size, flush=True)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    main()
