"""The run that the pictures show: the demo's guided arm. Records what they need, and photographs its page.

python tests/bench/picture_run.py runs/pictures      # part of `make pictures`; four minutes on two free cores

Writes results/pictures.json (maps, boxes and crops of two scenes, and what holds for all of them) and, where
Chromium is installed, the run's page as docs/pictures/report-light.webp and report-dark.webp.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from svg import PICTURES, ROOT, THEMES

from dali_views import RegionTable, SampleIndex, ViewLoader, recipes
from dali_views.maps.coordinates import iou
from dali_views.system.machine import machine
from dali_views.tools.scenes import make_scenes
from trainers import demo
from trainers import pretrain as loop
from trainers.config import file as config_file
from trainers.data import open_data
from trainers.report import page

RECORD = ROOT / "tests" / "bench" / "results" / "pictures.json"
HERO, MISSED = 171, 2866  # scenes; the first look at the second is one of the few that miss
EPOCH = 7  # whose crops are shown: the last of the run; one of the two random ones misses the object of HERO
CHANGES = ("guide.interval=1", "run.evaluate_every=1", "run.online_probe=true")
SHOT = (1240, 1300)  # pixels of the page that are photographed, and what is left out of it
LEFT_OUT = "<style>.charts > :nth-child(n + 7) {display: none}</style></head>"

F64 = NDArray[np.float64]


def train(out: Path) -> tuple[SampleIndex, list[tuple[F64, F64]], RegionTable]:
    """Train as the demo does. The images, the maps (N, h, w) and boxes (N, 4) after each pass of the guide,
    and the table at the end."""
    images, instances = make_scenes(out / "scenes", demo.SCENES, 128, share=demo.SMALL, objects=(1, 1))
    shutil.rmtree(out / "guided", ignore_errors=True)
    paths = [f"run.out={out / 'guided'}", f"data.path={images}", f"data.instances={instances}"]
    config = config_file.load(demo.CONFIG, [*paths, *CHANGES])
    index = open_data(config.data, config.run.seed).train
    per_epoch = len(index) // config.optim.batch
    passes: dict[int, tuple[F64, F64]] = {}
    tables: list[RegionTable] = []
    save = loop.save

    def saving(config: Any, keep: Mapping[str, Any], step: int) -> None:
        save(config, keep, step)
        maps, regions = keep["guide"].maps.state_dict()["maps"], keep["regions"]
        passes.setdefault(keep["guide"].passes, (maps.double().numpy(), regions.boxes[:, 0].astype(float)))
        tables[:] = [regions]

    loop.save = saving
    try:  # within an epoch, a checkpoint is written before the pass that follows it
        loop.pretrain(config_file.override(config, [f"run.checkpoint_every={per_epoch}"]))
    finally:
        loop.save = save
    return index, [passes[number] for number in sorted(passes)], tables[0]


def record(index: SampleIndex, passes: Sequence[tuple[F64, F64]], table: RegionTable) -> dict[str, Any]:
    """What the pictures show of a run, as plain values."""
    true = np.stack([index.truth(row)[0] for row in range(len(index))]).astype(float)
    names = [Path(index.path(row)).stem for row in range(len(index))]
    overlaps = [overlap(boxes, true) for _, boxes in passes]

    def scene(number: int) -> dict[str, Any]:
        row = names.index(f"{number:06d}")
        found = [
            {
                "map": maps[row].round(2).tolist(),
                "box": boxes[row].round(4).tolist(),
                "iou": round(float(each[row]), 3),
            }
            for (maps, boxes), each in zip(passes, overlaps, strict=True)
        ]
        return {"scene": number, "true": true[row].round(4).tolist(), "passes": found}

    crops = {kind: crops_of(index, table, kind) for kind in ("random", "contrastive")}
    row = names.index(f"{HERO:06d}")
    return {
        "machine": machine("cpu"),
        "scenes": [scene(HERO), scene(MISSED)],
        "crops": {kind: found[row].round(4).tolist() for kind, found in crops.items()},
        # The share of images both of whose crops show at least half of the true box.
        "both_show": {
            kind: round(float((shown(found, true) >= 0.5).all(1).mean()), 3) for kind, found in crops.items()
        },
        "mean_iou": [round(float(each.mean()), 3) for each in overlaps],
        "corloc": [round(float((each >= 0.5).mean()), 3) for each in overlaps],
        "first_misses": int((overlaps[0] < 0.5).sum()),
        "images": len(index), "epoch": EPOCH,
    }  # fmt: skip


def crops_of(index: SampleIndex, table: RegionTable, kind: str) -> F64:
    """(N, 2, 4) the two crops of every image in `EPOCH`."""
    views = recipes.moco_v2(64, crop=kind, blur=0)
    loader = ViewLoader(index, views, 50, regions=table, device="cpu", shuffle=False, drop_last=False)
    loader.set_epoch(EPOCH)
    crops = np.zeros((len(index), 2, 4))
    for batch in loader:
        crops[batch.index.numpy()] = batch.crops.numpy()
    return crops


def overlap(boxes: F64, true: F64) -> F64:
    """(N,) IoU of boxes (N, 4), pair by pair."""
    import torch

    return np.asarray(iou(torch.from_numpy(boxes), torch.from_numpy(true)))


def shown(crops: F64, true: F64) -> F64:
    """(N, V) the share of a true box (N, 4) that each crop (N, V, 4) shows."""
    true = true[:, None]
    both = np.minimum(crops[..., 2:], true[..., 2:]) - np.maximum(crops[..., :2], true[..., :2])
    return both.clip(0).prod(-1) / (true[..., 2:] - true[..., :2]).prod(-1)


def photograph(file: Path, browser: str, folder: Path) -> None:
    """Write docs/pictures/report-light.webp and report-dark.webp: curves of a page, and its boxes."""
    shown = folder / "report.html"
    shown.write_text(file.read_text(encoding="utf-8").replace("</head>", LEFT_OUT), encoding="utf-8")
    for dark, theme in enumerate(THEMES):
        shot = folder / f"report-{theme.name}.png"
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}", "--window-size={},{}".format(*SHOT),
            f"--blink-settings=preferredColorScheme={1 - dark}", f"--screenshot={shot}",
        ]  # fmt: skip
        subprocess.run(
            [browser, *options, shown.resolve().as_uri()], check=True, capture_output=True, timeout=120
        )
        with Image.open(shot) as image:
            image.convert("RGB").save(PICTURES / f"report-{theme.name}.webp", "WEBP", quality=80, method=6)


def main(out: Path) -> None:
    index, passes, table = train(out)
    RECORD.write_text(json.dumps(record(index, passes, table)) + "\n", encoding="utf-8")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print("no Chromium here: report-light.webp and report-dark.webp stay as they are")
    else:
        photograph(page.write(out / "guided"), browser, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
