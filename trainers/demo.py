"""The demonstration: scenes with small objects, pretrained on with random, guided and true crops, in minutes.

python -m trainers demo runs/demo
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dali_views.tools import scenes
from dali_views.tools.command_line import Answer

from . import config as cfg
from .config import file as config_file
from .data import open_data
from .engine.lock import held
from .pretrain import pretrain
from .report import CONFIG as CONFIG_OF_RUN
from .report import PAGE
from .report.report import table

__all__ = ["command", "demo"]

CONFIG = Path(__file__).resolve().parent / "configs" / "demo.yaml"
SCENES = 3000
SMALL = (0.03, 0.08)
"""Shares of the picture that the square around an object takes: random crops often miss it."""
_OWN = ("run.out", "data.path", "data.kind", "data.instances")
# The same run three times from equal weights; only where crops are placed differs.
_ARMS = {
    "random": ["guide={name: none}", "views.crop=random"],
    "guided": [],
    "true": ["guide={name: true_boxes}"],
}


def command(args: argparse.Namespace) -> Answer:
    """`demo`, which prints as it goes."""
    found = demo(args.out, args.scenes, args.overrides)
    return Answer(found, _told(found))


def demo(out: Path, count: int = SCENES, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Make scenes below `out`, pretrain on them three times and measure what was learnt.

    Args:
        count: scenes to make; a third of them is held out.
        changes: overrides of configs/demo.yaml for all arms, such as "run.epochs=4".

    Returns:
        "rows", the scores of the untrained network and of each arm; "gain", of guided over random crops in
        kNN top-1, and its "standard_error", both shares in [0, 1], with "share" of what true boxes gain;
        "held_out", the number of scenes classified; "seconds"; "out" and "report", paths.
    """
    if own := [change for change in changes if change.partition("=")[0] in _OWN]:
        raise ValueError(
            f"{own[0]}: the demo makes its own scenes and folders; use pretrain with configs/demo.yaml"
        )
    # Mistakes are found before scenes are made and an earlier demo's runs are deleted.
    config = config_file.load(CONFIG, changes)
    if not config.run.evaluate_every:
        raise ValueError("run.evaluate_every 0 measures nothing, but the demo compares; remove it")
    if isinstance(config.box_guide, cfg.NoGuide):
        raise ValueError("guide.name none writes no boxes, but the demo compares guided with random crops")
    for name, difference in _ARMS.items():
        config_file.load(CONFIG, [*changes, *difference])
        if (out / name).exists() and not _holds_a_run(out / name):
            raise FileExistsError(f"{out / name} exists and holds no run of a demo; name another folder")
    with held(out):
        return _demo(out, count, changes)


def _demo(out: Path, count: int, changes: Sequence[str]) -> dict[str, Any]:
    began = time.perf_counter()
    images, instances = scenes.make_scenes(out / "scenes", count, size=128, share=SMALL, objects=(1, 1))
    print(f"{count} scenes with known objects in {images} ({time.perf_counter() - began:.0f} s)")
    rows: dict[str, dict[str, float]] = {}
    for name, difference in _ARMS.items():
        folder = out / name
        if folder.exists():
            print(f"\n{folder} is from an earlier demo and is made again.")
            with held(folder):  # it may train still
                shutil.rmtree(folder)
        paths = [f"run.out={folder}", f"data.path={images}", f"data.instances={instances}"]
        print(f"\n{name} crops: {' '.join(difference) or 'as configured'}")
        config = config_file.load(CONFIG, [*paths, *changes, *difference])
        result = pretrain(config)
        if not result.finished:  # by a signal: arms of unequal length cannot be compared
            raise InterruptedError(
                f"the demo was stopped after {result.step} steps; repeat it to start again"
            )
        # The untrained network is the same in all arms.
        rows["untrained"], *_, last = result.scores.values()
        rows[f"{name} crops"] = last
    queries = open_data(config.data, config.run.seed).queries
    assert queries is not None
    random, guided, true = (rows[f"{name} crops"]["knn_top1"] for name in _ARMS)
    error = math.sqrt((guided * (1 - guided) + random * (1 - random)) / len(queries))
    gain, most = guided - random, true - random
    return {
        "out": out, "rows": rows, "gain": gain, "standard_error": error, "held_out": len(queries),
        "share": gain / most if most > 0 else None, "report": out / "guided" / PAGE,
        "seconds": round(time.perf_counter() - began),
    }  # fmt: skip


def _told(found: dict[str, Any]) -> str:
    gain, error = 100 * found["gain"], 100 * found["standard_error"]
    told = f"Guided crops gain {gain:+.1f} points of kNN top-1 over random crops"
    if abs(gain) < 2 * error:
        told += ": no difference can be seen with so few steps or images"
    elif found["share"] is not None:
        told += f", {found['share']:.0%} of what true boxes gain"
    before, after = (found["rows"][name].get("corloc", 0.0) for name in ("untrained", "guided crops"))
    if after < before:
        told += (
            ".\nCorLoc falls because maps of a network get worse while it trains; the guide averages them "
            "over its passes (docs/guides.md)"
        )
    return (
        f"\n{table(found['rows'])}\n\n{told}.\nStandard error {error:.1f} points ("
        f"{found['held_out']} held-out scenes, one seed; docs/results.md has several seeds).\n\n"
        f"Open      {found['report']}\nPictures  {found['out'] / 'guided' / 'pictures'}\n"
        f"Curves    tensorboard --logdir {found['out']}\nThe demo took {found['seconds']} s."
    )


def _holds_a_run(folder: Path) -> bool:
    """Whether a folder has a run's configuration, so that the demo may delete it."""
    try:
        config_file.load(folder / CONFIG_OF_RUN)
    except (OSError, ValueError):
        return False
    return True
