"""The demonstration: scenes whose objects are known, pretrained on with and without guidance, in minutes.

python -m trainers demo runs/demo
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from dali_views.tools import scenes
from dali_views.tools.command_line import Answer

from . import config as cfg
from .config import file as config_file
from .data import open_data
from .evaluate.box_scores import reference
from .pretrain import pretrain
from .report import CONFIG as CONFIG_OF_RUN
from .report.report import table

__all__ = ["command", "demo"]

CONFIG = Path(__file__).resolve().parent / "configs" / "demo.yaml"
SCENES = 1200
_OWN = ("run.out", "data.path", "data.kind", "data.instances")
# The published baseline is the same run whose warm-up never ends: no box is written, so all crops are random.
_ARMS = {"random": ["guide.warmup=1000"], "guided": []}


def command(args: argparse.Namespace) -> Answer:
    """`demo`, which prints as it goes."""
    demo(args.out, changes=args.overrides)
    return Answer({"out": args.out}, "")


def demo(out: Path, count: int = SCENES, changes: Sequence[str] = ()) -> None:
    """Make scenes below `out`, pretrain on them twice from equal weights and print what was learnt.

    Args:
        count: scenes to make; a quarter of them is held out.
        changes: overrides of configs/demo.yaml for both arms, such as "run.epochs=4".
    """
    if own := [change for change in changes if change.partition("=")[0] in _OWN]:
        raise ValueError(
            f"{own[0]}: the demo has scenes and folders of its own; use pretrain with configs/demo.yaml"
        )
    # Mistakes are found before scenes are made and an earlier demo's runs are deleted.
    guide = config_file.load(CONFIG, changes).guide
    if not isinstance(guide, cfg.Localised):
        raise ValueError(
            f"guide.name {guide.name} has no warm-up, which the demo's other arm never leaves; "
            "choose contrastive_crop, online_crop or saliency"
        )
    for name, difference in _ARMS.items():
        config_file.load(CONFIG, [*changes, *difference])
        if (out / name).exists() and not _holds_a_run(out / name):
            raise FileExistsError(f"{out / name} is there and holds no run of a demo; name another folder")
    began = time.perf_counter()
    images, instances = scenes.make_scenes(out / "scenes", count, size=96)
    print(f"{count} scenes with known objects in {images} ({time.perf_counter() - began:.0f} s)")
    rows: dict[str, dict[str, float]] = {}
    for name, difference in _ARMS.items():
        folder = out / name
        if folder.exists():
            print(f"\n{folder} is from an earlier demo and is made again.")
            shutil.rmtree(folder)
        paths = [f"run.out={folder}", f"data.path={images}", f"data.instances={instances}"]
        print(f"\n{name}: {' '.join(difference) or 'as configured'}")
        config = config_file.load(CONFIG, [*paths, *changes, *difference])
        result = pretrain(config)
        if not result.finished:  # by a signal: arms of unequal length cannot be compared
            raise InterruptedError(
                f"the demo was stopped after {result.step} steps; repeat it to start again"
            )
        # The untrained network is the same in both arms.
        rows["untrained"], *_, last = result.scores.values()
        rows[f"{name} crops"] = last
    data = open_data(config.data, config.run.seed)
    references = {} if data.queries is None else reference(data.queries)
    boxes = {f"{n} box": {"iou": f["iou_best"], "corloc": f["corloc"]} for n, f in references.items()}
    print(f"\n{table(rows | boxes)}")
    start = rows["untrained"].get("corloc", 0.0)
    if worse := [name for name, row in rows.items() if row.get("corloc", 0.0) < start]:
        print(f"After so short a training {' and '.join(worse)} find objects worse (CorLoc) than untrained.")
    print("One seed: differences of a few points between the arms are noise; see configs/ for whole runs.")
    print(f"\nPictures: {', '.join(str(out / name / 'pictures') for name in _ARMS)}")
    print(f"Curves:   tensorboard --logdir {out}")
    print(f"The demo took {time.perf_counter() - began:.0f} s.")


def _holds_a_run(folder: Path) -> bool:
    """Whether a folder has a run's configuration, so that the demo may delete it."""
    try:
        config_file.load(folder / CONFIG_OF_RUN)
    except (OSError, ValueError):
        return False
    return True
