"""What `compare` measures of a run beside kNN and the linear probe: mAP, labelled sets, a detector."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dali_views.system.files import atomic_write

from . import config as cfg
from .config import file as config_file
from .detect.train import train_detector
from .encoders.backbones import Backbone
from .engine import ranks
from .engine.setting import Setting
from .evaluate import multilabel
from .evaluate.kept import digest
from .evaluate.labelled_sets import read_sets
from .evaluate.transfer import mean_of, transfer
from .saved_run import encoder_of

__all__ = ["Measures"]

_FILE = "measured.json"  # in a run's folder: scores by a digest of all that they depend on


@dataclass(frozen=True)
class Measures:
    """Which of them, and by which files."""

    multilabel: bool = False
    """mAP of the classes of all objects in the run's images."""
    sets: Path | None = None
    """Labelled sets, as for `transfer`: the mean of the linear classifiers."""
    detector: tuple[Path, ...] = ()
    """Files with a section `detect`, and `data` unless it is trained on the run's images: AP."""

    def check(self, config: cfg.Config) -> None:
        """A ConfigError if a file is wrong; before a run trains for hours."""
        if self.sets is not None:
            read_sets(self.sets, config)
        _with_files(config, self.detector)

    def of(
        self, config: cfg.Config, setting: Setting, saved: Mapping[str, Any], encoder: Backbone
    ) -> dict[str, Any] | None:
        """Fields of a `Run`, each measured once and kept in the run's folder; None: a signal stopped it."""
        folder, found = Path(config.run.out), dict[str, Any]()
        about = f"{saved['step']} {config_file.dump(config)}"
        if self.multilabel:

            def several() -> dict[str, float]:
                sides = multilabel.sides_of(config, setting, encoder)
                means, _ = multilabel.means(multilabel.linear(sides, setting.seed)[0], sides)
                return {"map": means["map"]}

            found |= _once(folder, f"map {about}", several) or {}
        if self.sets is not None:
            sets = read_sets(self.sets, config)

            def many() -> dict[str, float]:
                mean = mean_of(list(transfer(sets, setting, encoder, config.views)))
                return {"transfer": mean.linear or 0.0}

            found |= _once(folder, f"transfer {sets} {about}", many) or {}
        if self.detector:
            changed = _with_files(config, self.detector)

            def detection() -> dict[str, float] | None:
                own = encoder_of(config, saved, "trained", setting.device)  # which learns
                result = train_detector(changed, setting, own, folder / "detect", resume=True)
                names = ("box_ap", "mask_ap")
                scores = {name: result.scores[name] for name in names if name in result.scores}
                return scores if result.finished else None

            scores = _once(folder, f"detect {saved['step']} {config_file.dump(changed)}", detection)
            if scores is None:
                return None
            found |= scores
        return found


def _with_files(config: cfg.Config, files: tuple[Path, ...]) -> cfg.Config:
    """The configuration of the detector, which `run.max_steps` of pretraining does not cut."""
    changed = config_file.override(config, [], files)
    return changed.model_copy(update={"run": changed.run.model_copy(update={"max_steps": None})})


def _once(
    folder: Path, about: str, measure: Callable[[], dict[str, float] | None]
) -> dict[str, float] | None:
    """What `measure` found for `about` the first time."""
    file, key = folder / _FILE, digest({}, about)
    known = json.loads(file.read_text()) if file.is_file() else {}
    if ranks.any_rank(key not in known):
        found = measure()
        if found is None:
            return None
        known[key] = found
        if ranks.is_main():
            with atomic_write(file) as draft:
                draft.write(json.dumps(known).encode())
        ranks.barrier()
    scores: dict[str, float] = known[key]
    return scores
