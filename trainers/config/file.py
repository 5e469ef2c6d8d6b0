"""Configuration files: YAML in, a checked and frozen `Config` out, or one sentence that names the wrong key.

    config = load("configs/demo.yaml", ["optim.lr=0.1", "method.name=moco"])
    config = load(["configs/cifar10/simclr.yaml", "configs/data/stl10.yaml"])

A file may be a short diff: `base: other.yaml` names the file it changes, relative to itself; `base: [a.yaml,
b.yaml]` names several, merged in this order. Where `name` chooses a section (`method`, `guide`, `optim`),
a new name starts the section afresh: keys of the old choice do not leak into the new one. A section without a
name keeps the default choice.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import MappingEndEvent, MappingStartEvent, SequenceEndEvent, SequenceStartEvent

from .. import config as cfg
from . import Config, Section

__all__ = ["ConfigError", "differences", "dump", "load", "override", "parse"]

_BROUGHT = Path(__file__).resolve().parents[1] / "configs"
_LONGEST = 50_000  # characters of a file; the longest of ours has some thousand
_DEEPEST = 20  # sections and lists inside each other

# Names in other projects: a letter's likeness would suggest min_lr for learning_rate.
_ELSEWHERE = {
    "learning_rate": "lr", "base_lr": "lr", "batch_size": "batch", "wd": "weight_decay", "arch": "backbone",
    "workers": "threads", "num_workers": "threads", "max_epochs": "epochs", "output_dir": "out",
    "data_dir": "path", "root_dir": "path", "img_size": "size", "image_size": "size", "temp": "temperature",
    "num_crops": "locals",
}  # fmt: skip
_CHOICES: dict[str, dict[str, type[Section]]] = {
    # Annotated[A | B, ...] holds the union, and the union its members.
    section: {each.model_fields["name"].default: each for each in get_args(get_args(choice)[0])}
    for section, choice in (("method", cfg.Method), ("guide", cfg.Guide), ("optim", cfg.Optim))
}
_DEFAULTS = {section: Config.model_fields[section].default.name for section in _CHOICES}


class ConfigError(ValueError):
    """The configuration is wrong; the message names the dotted key."""


def load(files: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Read YAML files and their bases, apply overrides and check the result.

    Args:
        files: a YAML file, several merged in order, or names joined by "+". A file below configs/ that does
            not exist is the one of that name in the package, if there is one. `run.out`, if absent, is made
            of the names: runs/cifar10/simclr-stl10.
        overrides: "section.key=value"; the value is read as YAML, the last one wins.

    Raises:
        FileNotFoundError: a file or one of its bases does not exist.
        ConfigError: a key is unknown, missing or ill-typed, or two parts do not fit.
    """
    given = [files] if isinstance(files, str | Path) else files
    paths = [Path(name) for file in given for name in str(file).replace(".yaml+", ".yaml\n").split("\n")]
    tree: dict[str, Any] = {}
    for path in paths:
        tree = _merge(tree, _read(_found(path), ()))
    tree = _merge(tree, _parse_overrides(overrides))
    if isinstance(run := tree.setdefault("run", {}), dict):
        first = paths[0].parts[paths[0].parts.index("configs") + 1 :] if "configs" in paths[0].parts else ()
        name = Path(*first or (paths[0].name,)).with_suffix("")
        run.setdefault("out", "-".join([f"runs/{name}", *(path.stem for path in paths[1:])]))
    return _check(tree, "+".join(map(str, paths)))


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with some values changed, checked as by `load`."""
    return _check(_merge(config.model_dump(mode="json"), _parse_overrides(overrides)), "the overrides")


def parse(text: str) -> Config:
    """The configuration that `dump` wrote, checked as by `load`."""
    if not isinstance(text, str):
        raise ConfigError(f"the stored configuration is no text but a {type(text).__name__}")
    return _check(_sections(text, "the stored configuration"), "the stored configuration")


def dump(config: Config) -> str:
    """The whole configuration as YAML text, defaults included; `load` of it gives an equal Config."""
    yaml, text = YAML(typ="safe", pure=True), io.StringIO()
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 2**20
    yaml.dump(config.model_dump(mode="json"), text)
    return text.getvalue()


def differences(one: Config, other: Config) -> list[str]:
    """Dotted keys in which two configurations differ."""
    flat = [_flatten(config.model_dump(mode="json")) for config in (one, other)]
    return sorted(key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _found(path: Path) -> Path:
    """The file, or the package's own below configs/: an installed package has no checkout around it."""
    packaged = _BROUGHT.joinpath(*path.parts[1:])
    ours = path.parts[:1] == ("configs",) and not os.path.isfile(path) and os.path.isfile(packaged)
    return packaged if ours else path


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        where = f", named as base in {seen[-1]}" if seen else ""
        raise FileNotFoundError(f"there is no configuration file {path}{where}; check the path")
    if path.resolve() in seen:
        raise ConfigError(f"{path} is its own base ({' -> '.join(p.name for p in seen)}); break the circle")
    with open(path, encoding="utf-8") as file:
        try:
            tree = _sections(file.read(_LONGEST + 1), str(path))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not text in UTF-8: {error}") from None
    bases = tree.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"base should be a file name or a list of them, not {bases!r} (in {path})")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _read(path.parent / base, (*seen, path.resolve())))
    return _merge(merged, tree)


def _sections(text: str, source: str) -> dict[str, Any]:
    tree = _parse(text, source)
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{source} should hold sections such as `run:`, not a {type(tree).__name__}")
    return tree or {}


def _parse(text: str, source: str) -> Any:
    """YAML 1.2 without aliases, which may stand for more values than memory holds, and without tags."""
    if len(text) > _LONGEST:
        raise ConfigError(f"{source} has more than {_LONGEST} characters, which is no configuration")
    depth, yaml = 0, YAML(typ="safe", pure=True)
    try:
        for event in yaml.parse(io.StringIO(text)):
            place = f"{source}, line {event.start_mark.line + 1}"
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise ConfigError(f"{place}: anchors, aliases and tags are not read; write the value itself")
            depth += isinstance(event, MappingStartEvent | SequenceStartEvent)
            depth -= isinstance(event, MappingEndEvent | SequenceEndEvent)
            if depth > _DEEPEST:
                raise ConfigError(f"{place}: sections are nested more than {_DEEPEST} deep; remove some")
        return YAML(typ="safe", pure=True).load(text)
    except ConfigError:
        raise
    # The others are Python's, about digits or an escaped character that cannot be.
    except (YAMLError, ValueError, OverflowError) as error:
        told = getattr(error, "problem", None) or error
        line = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise ConfigError(f"{source}{line} is not valid YAML: {' '.join(str(told).split()):.300}") from None


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        *sections, last = key.strip().split(".")
        if not equals or not all([*sections, last]):
            raise ConfigError(f"override {text!r} should look like section.key=value")
        level = tree
        for section in sections:
            level = level.setdefault(section, {})
            if not isinstance(level, dict):
                raise ConfigError(
                    f"override {text!r} contradicts an earlier one that sets {section} as a whole"
                )
        level[last] = _parse(value, f"override {text!r}")
    return tree


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`old` changed key by key; what is chosen by `name` starts afresh with a new name."""
    merged = {**old, **new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            name = before.get("name", _DEFAULTS.get(key))
            afresh = key in (*_CHOICES, "boxes") and value.get("name", name) != name
            merged[key] = value if afresh else _merge(before, value)
    return merged


def _check(tree: dict[str, Any], source: str) -> Config:
    for section in _CHOICES:
        if isinstance(tree.get(section), dict):
            tree[section] = {"name": _DEFAULTS[section], **tree[section]}
    if isinstance(tree.get("guide"), dict) and isinstance(tree.get("run"), dict):
        tree["guide"] = _in_epochs(tree["guide"], tree["run"].get("epochs", 100))
    try:
        # The JSON route is strict yet takes a list for a tuple; default=str turns YAML dates into text.
        return Config.model_validate_json(json.dumps(tree, default=str))
    except TypeError:
        raise ConfigError(f"a key is a list or a section instead of a word (in {source})") from None
    except ValidationError as error:
        raise ConfigError(f"{_explain(error, tree)} (in {source})") from None


def _in_epochs(guide: Mapping[str, Any], epochs: Any) -> dict[str, Any]:
    """A guide whose `warmup` and `interval`, if they are shares of the run such as 20%, are in epochs."""
    changed = dict(guide)
    for key, value in guide.items():
        if isinstance(value, dict):
            changed[key] = _in_epochs(value, epochs)
        elif key in ("warmup", "interval") and re.fullmatch(r"\d+%", str(value)) and type(epochs) is int:
            changed[key] = max(1, epochs * int(value[:-1]) // 100)
    return changed


def _explain(error: ValidationError, tree: Mapping[str, Any]) -> str:
    """One sentence on one error; a misspelt key goes first, for it is the cause of a missing one."""
    first = min(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    kind, place = first["type"], [str(part) for part in first["loc"]]
    if place and place[0] in _CHOICES and len(place) > 1:
        del place[1]  # pydantic inserts the chosen name
    key = ".".join(place)
    match kind:
        case "json_invalid":
            return "a text holds what is no Unicode"
        case "extra_forbidden":
            return f"{key} is not a known key; {_nearest(key, tree)}"
        case "union_tag_invalid":
            *names, last = _CHOICES[place[0]]
            return f"{key}.name should be {', '.join(names)} or {last}, not {first['ctx']['tag']!r}"
        case "missing":
            return f"{key} is missing; give it in the file or as an override"
        case "value_error":
            return str(first["ctx"]["error"])
        case "model_type" | "model_attributes_type":
            return f"{key} should be a section with keys, not {first['input']!r:.200}"
    return f"{key} {first['msg'].removeprefix('Input ')}, not {first['input']!r:.200}"


def _nearest(key: str, tree: Mapping[str, Any]) -> str:
    """What was probably meant by an unknown key, else the keys that are valid beside it."""
    valid = []
    for section, field in Config.model_fields.items():
        chosen: Any = field.annotation
        if section in _CHOICES:  # a wrong name chooses none
            given = tree.get(section)
            chosen = _CHOICES[section].get(given["name"] if isinstance(given, dict) else _DEFAULTS[section])
        valid += [section, *(f"{section}.{name}" for name in getattr(chosen, "model_fields", ()))]
    above, _, word = key.rpartition(".")
    siblings = [each for each in valid if each.rpartition(".")[0] == above]
    near = [each for each in [*siblings, *valid] if each.rpartition(".")[2] == _ELSEWHERE.get(word)]
    near = near or difflib.get_close_matches(key, siblings, n=1)
    near = near or [each for each in valid if each.rpartition(".")[2] == word]
    return f"did you mean {near[0]}?" if near else f"valid here: {', '.join(siblings) or 'nothing'}"
