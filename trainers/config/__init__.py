"""The typed configuration of a run, and what is wrong with one; `file` reads it from YAML and writes it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError, model_validator

from dali_views.tools.command_line import NEAR

from .detect import Detect
from .guides import (
    Boxes,
    BoxGuide,
    ContrastiveCrop,
    FrozenBoxes,
    Guide,
    Localised,
    NoGuide,
    OnlineCrop,
    Passes,
    Read,
    Saliency,
    SemanticPairs,
    SimCCrop,
    TrueBoxes,
)
from .methods import BYOL, DINO, LARS, SCFS, SGD, AdamW, LeJEPA, Method, MoCo, Optim, Own, SimCLR, SimSiam
from .sections import Data, FineTune, Knn, Localise, MapKind, Maps, Model, Probe, Run, Section, Views

__all__ = [
    "BYOL", "CHOICES", "DEFAULTS", "DINO", "LARS", "SCFS", "SGD", "AdamW", "BoxGuide", "Boxes", "Config",
    "ConfigError", "ContrastiveCrop", "Data", "Detect", "FineTune", "FrozenBoxes", "Guide", "Knn", "LeJEPA",
    "Localise",
    "Localised", "MapKind", "Maps", "Method", "MoCo", "Model", "NoGuide", "OnlineCrop", "Optim", "Own",
    "Passes", "Probe", "Read", "Run", "Saliency", "Section", "SemanticPairs", "SimCCrop", "SimCLR", "SimSiam",
    "TrueBoxes", "Views", "check",
]  # fmt: skip


class Config(Section):
    """A whole training run."""

    run: Run
    """Where, how long and on what the run goes."""
    data: Data
    """Which images there are."""
    views: Views = Views()
    """What a view is."""
    model: Model = Model()
    """The encoder."""
    method: Method = MoCo()
    """The loss with its networks, chosen by `name`."""
    guide: Guide = NoGuide()
    """Who writes the region table, chosen by `name`."""
    optim: Optim = SGD()
    """The optimiser and its schedule, chosen by `name`."""
    localise: Localise = Localise()
    """How evaluations find the object in the encoder's maps."""
    knn: Knn = Knn()
    """How the nearest neighbours classify."""
    probe: Probe = Probe()
    """How a linear classifier is trained on the frozen encoder afterwards."""
    finetune: FineTune = FineTune()
    """How encoder and classifier are trained on a share of the labels afterwards."""
    detect: Detect = Detect()
    """How a detector is trained on the encoder afterwards."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        pairs = isinstance(self.guide, SemanticPairs)
        if pairs != (self.views.partner != "none"):
            raise ValueError(
                f"views.partner {self.views.partner} does not fit guide.name {self.guide.name}: the guide "
                "semantic_pairs finds partners, and views.partner replace or add shows them"
            )
        if self.box_guide.name != "none" and not self.views.guided:
            raise ValueError(
                f"guide.name {self.box_guide.name} writes boxes that views.crop {self.views.crop} ignores; "
                "set views.crop to contrastive or inside, or guide.name to none"
            )
        batch, parts = self.optim.batch, self.optim.accumulate
        if batch % parts:
            raise ValueError(
                f"optim.accumulate {parts} does not divide optim.batch {batch}; choose a divisor"
            )
        if isinstance(self.method, MoCo) and self.method.split_bn and batch // parts % self.method.split_bn:
            by_parts = "" if parts == 1 else f" / optim.accumulate {parts}"
            raise ValueError(
                f"method.split_bn {self.method.split_bn} does not divide optim.batch {batch}{by_parts}; "
                "choose a divisor"
            )
        return self

    @property
    def box_guide(self) -> BoxGuide:
        """The guide that writes boxes, alone or beside semantic pairs."""
        return self.guide.boxes if isinstance(self.guide, SemanticPairs) else self.guide

    @property
    def neighbours(self) -> tuple[int, float]:
        """k and temperature of kNN: those of `knn`, else those that the method's authors report."""
        k, temperature = (20, 0.07) if isinstance(self.method, DINO) else (200, 0.1)
        return self.knn.k or k, self.knn.temperature or temperature

    @property
    def regions(self) -> int:
        """How many regions per image the region table has room for."""
        return self.box_guide.regions if isinstance(self.box_guide, Saliency | FrozenBoxes) else 1


class ConfigError(ValueError):
    """The configuration is wrong; the message names the dotted key."""


# Names in other projects: a letter's likeness would suggest min_lr for learning_rate.
_ELSEWHERE = {
    "learning_rate": "lr", "base_lr": "lr", "batch_size": "batch", "wd": "weight_decay", "arch": "backbone",
    "workers": "threads", "num_workers": "threads", "max_epochs": "epochs", "output_dir": "out",
    "data_dir": "path", "root_dir": "path", "img_size": "size", "image_size": "size", "temp": "temperature",
    "num_crops": "locals",
}  # fmt: skip
CHOICES: dict[str, dict[str, type[Section]]] = {
    # Annotated[A | B, ...] holds the union, and the union its members.
    section: {each.model_fields["name"].default: each for each in get_args(get_args(choice)[0])}
    for section, choice in (("method", Method), ("guide", Guide), ("optim", Optim))
}
"""The classes that `name` chooses from, by section."""
DEFAULTS: dict[str, str] = {section: Config.model_fields[section].default.name for section in CHOICES}
"""The `name` that a section without one has."""


def check(tree: dict[str, Any], source: str, given: Mapping[str, Any] | None = None) -> Config:
    """The configuration of plain values; a ConfigError names what is wrong, and the source.

    Args:
        given: the part of the values that the command line has given, not the source.
    """
    for section in CHOICES:
        if isinstance(tree.get(section), dict):
            tree[section] = {"name": DEFAULTS[section], **tree[section]}
    if isinstance(tree.get("guide"), dict) and isinstance(tree.get("run"), dict):
        tree["guide"] = _in_epochs(tree["guide"], tree["run"].get("epochs", 100))
    try:
        # The JSON route is strict yet takes a list for a tuple; default=str turns YAML dates into text.
        return Config.model_validate_json(json.dumps(tree, default=str))
    except TypeError:
        raise ConfigError(f"a key is a list or a section instead of a word (in {source})") from None
    except ValidationError as error:
        first, place = _first(error)
        where = _source(place, source, given or {})
        raise ConfigError(f"{_explain(first, place, tree)} ({where})") from None


def _in_epochs(guide: Mapping[str, Any], epochs: Any) -> dict[str, Any]:
    """A guide whose `warmup` and `interval`, if they are shares of the run such as 20%, are in epochs."""
    changed = dict(guide)
    for key, value in guide.items():
        if isinstance(value, dict):
            changed[key] = _in_epochs(value, epochs)
        elif key in ("warmup", "interval") and re.fullmatch(r"\d+%", str(value)) and type(epochs) is int:
            changed[key] = max(int(value != "0%"), epochs * int(value[:-1]) // 100)
    return changed


def _first(error: ValidationError) -> tuple[Any, list[str]]:
    """One error and its place; a misspelt key goes first, for it is the cause of a missing one."""
    first = min(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    place = [str(part) for part in first["loc"]]
    if place and place[0] in CHOICES:
        del place[1:2]  # pydantic inserts the chosen name
    return first, place


def _source(place: Sequence[str], source: str, given: Mapping[str, Any]) -> str:
    """Where a value came from: a file, or the command line; both, if several values do not fit each other."""
    value: Any = given
    for part in place:
        if not isinstance(value, Mapping) or part not in value:
            return f"in {source}"
        value = value[part]
    if not isinstance(value, Mapping):
        return "on the command line"
    return f"in {source} and on the command line" if value else f"in {source}"


def _explain(first: Mapping[str, Any], place: Sequence[str], tree: Mapping[str, Any]) -> str:
    """One sentence on an error."""
    kind = first["type"]
    key, value = ".".join(place), f"{first['input']!r:.200}"
    match kind:
        case "json_invalid":
            return "a text is not valid Unicode"
        case "extra_forbidden":
            return f"{key} is not a known key; {_nearest(key, tree)}"
        case "union_tag_invalid":
            return f"{key}.name should be {first['ctx']['expected_tags']}, not {first['ctx']['tag']!r}"
        case "missing":
            return f"{key} is missing; give it in the file or as an override"
        case "value_error":
            return str(first["ctx"]["error"])
        case "model_type" | "model_attributes_type":
            return f"{key} should be a section with keys, not {value}"
    return f"{key} {first['msg'].removeprefix('Input ')}, not {value}"


def _nearest(key: str, tree: Mapping[str, Any]) -> str:
    """What was probably meant by an unknown key, else the keys that are valid beside it."""
    sections: dict[str, Any] = {name: field.annotation for name, field in Config.model_fields.items()}
    for name, choices in CHOICES.items():  # a wrong name chooses none
        given = tree.get(name)
        sections[name] = choices.get(str(given["name"]) if isinstance(given, dict) else DEFAULTS[name])
    keys = [f"{name}.{each}" for name in sections for each in getattr(sections[name], "model_fields", ())]
    above, _, last = key.rpartition(".")
    beside = [each for each in [*sections, *keys] if each.rpartition(".")[0] == above]
    same = [each for each in [*beside, *keys] if each.rpartition(".")[2] == _ELSEWHERE.get(last, last)]
    names = {each.rpartition(".")[2]: each for each in beside}  # the section before them is equal anyway
    near = same or [names[name] for name in difflib.get_close_matches(last, names, 1, NEAR)]
    return f"did you mean {near[0]}?" if near else f"valid here: {', '.join(beside) or 'nothing'}"
