"""The demonstration: scenes whose objects are known, pretrained on with and without guidance, in minutes.

python -m trainers demo runs/demo
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from dali_views import SampleIndex, scenes

from . import config_file
from .evaluate.localisation import reference
from .pretrain import Result, pretrain
from .report import table

__all__ = ["demo"]

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
SCENES = 1200


def demo(out: Path) -> None:
    """Make scenes below `out`, pretrain on them twice from equal weights and print what was learnt."""
    began = time.perf_counter()
    images, instances = scenes.make_scenes(out / "scenes", SCENES, size=96)
    print(f"{SCENES} scenes with known objects in {images} ({time.perf_counter() - began:.0f} s)")
    rows: dict[str, dict[str, float]] = {}
    for name, changes in _ARMS.items():
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        paths = [f"run.out={folder}", f"data.path={images}", f"data.instances={instances}"]
        print(f"\n{name}: {' '.join(changes) or 'as configured'}")
        result = pretrain(config_file.load(CONFIG, [*paths, *changes]))
        rows |= _rows(name, result)
    print(f"\n{table(rows | _references(images, instances))}")
    print(f"\nPictures: {', '.join(str(out / name / 'pictures') for name in _ARMS)}")
    print(f"Curves:   tensorboard --logdir {out}")
    print(f"The demo took {time.perf_counter() - began:.0f} s.")


# The published baseline is the same run whose warm-up never ends: no box is written, so all crops are random.
_ARMS = {"random": ["guide.warmup=1000"], "guided": []}


def _references(images: Path, instances: Path) -> dict[str, dict[str, float]]:
    """What boxes score that look at nothing."""
    index = SampleIndex.from_coco(images, instances, progress=False)
    return {
        f"{name} box": {"iou": found["iou_best"], "corloc": found["corloc"]}
        for name, found in reference(index).items()
    }


def _rows(name: str, result: Result) -> dict[str, dict[str, float]]:
    """The untrained network, the same in both arms, and the arm's last scores."""
    moments = list(result.scores)
    return {"untrained": result.scores[moments[0]], f"{name} crops": result.scores[moments[-1]]}
