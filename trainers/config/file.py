"""Configuration files: YAML in, a checked and frozen `Config` out, or one sentence that names the wrong key.

    config = load("configs/demo.yaml", ["optim.lr=0.1", "method.name=moco"])

A file may be a short diff: `base: other.yaml` names the file it changes, relative to itself. Unknown or
ill-typed keys are errors that name the key. Where a section is chosen by `name` (`method`, `guide`,
`optim`), a new name starts the section afresh: keys of the old choice do not leak into the new one. A
section without a name keeps the default choice.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from .. import config as cfg
from . import Config, Section

__all__ = ["ConfigError", "differences", "dump", "load", "override", "parse"]


class ConfigError(ValueError):
    """The configuration is wrong; the message names the dotted key."""


_BROUGHT = Path(__file__).resolve().parents[1] / "configs"
_LONGEST = 50_000  # characters of a file; the longest of ours has some thousand
_DEEPEST = 20  # sections and lists inside each other

# How others name what is meant: a letter's likeness would suggest min_lr for learning_rate.
_ELSEWHERE = {
    "learning_rate": "lr", "base_lr": "lr", "batch_size": "batch", "wd": "weight_decay", "arch": "backbone",
    "workers": "threads", "num_workers": "threads", "max_epochs": "epochs", "output_dir": "out",
    "data_dir": "path", "root_dir": "path", "img_size": "size", "image_size": "size", "temp": "temperature",
    "num_crops": "locals",
}  # fmt: skip

_CHOICES: dict[str, tuple[type[Section], ...]] = {
    # Annotated[A | B, ...] holds the union, and the union its members.
    section: get_args(get_args(choice)[0])
    for section, choice in (("method", cfg.Method), ("guide", cfg.Guide), ("optim", cfg.Optim))
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and its bases, apply overrides and check the result.

    Args:
        path: YAML file; its optional top-level key `base` names another file, relative to it. A file below
            configs/ that does not exist is the one of that name that the package brings, if there is one.
        overrides: "section.key=value" strings; the value is read as YAML, the last one wins.

    Raises:
        FileNotFoundError: the file or one of its bases does not exist.
        ConfigError: a key is unknown, missing or ill-typed, or two parts do not fit.
    """
    return _check(_merge(_read(_found(Path(path)), ()), _parse_overrides(overrides)), str(path))


def _found(path: Path) -> Path:
    """The file, or that of the package's own configs/: around an installed package there is no checkout."""
    brought = _BROUGHT.joinpath(*path.parts[1:])
    ours = path.parts[:1] == ("configs",) and not os.path.isfile(path) and os.path.isfile(brought)
    return brought if ours else path


def _check(data: dict[str, Any], source: str) -> Config:
    for section in _CHOICES:
        if isinstance(data.get(section), dict):
            data[section] = {"name": _default_name(section), **data[section]}
    try:
        # The JSON route is strict yet takes a list for a tuple; default=str turns YAML dates into text.
        return Config.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        raise ConfigError(f"{_explain(error, data)} (in {source})") from None


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with some values changed, checked as by `load`."""
    return _check(_merge(config.model_dump(mode="json"), _parse_overrides(overrides)), "the overrides")


def parse(text: str) -> Config:
    """The configuration that `dump` wrote, checked as by `load`."""
    source = "the stored configuration"
    if not isinstance(text, str):
        raise ConfigError(f"{source} is no text but a {type(text).__name__}")
    return _check(_sections(text, source), source)


def differences(one: Config, other: Config) -> list[str]:
    """Dotted keys in which two configurations differ."""
    flat = [_flatten(config.model_dump(mode="json")) for config in (one, other)]
    return sorted(key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def dump(config: Config) -> str:
    """The whole configuration as YAML text, defaults included; `load` of it gives an equal Config."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


class _Loader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """YAML 1.2 scalars: 1e-4 is a number, only true and false are bools; and a key stands once.

    There are no aliases and no tags: a few aliases of each other stand for more values than memory holds, and
    tags make other things than text and numbers.
    """

    depth = 0

    yaml_implicit_resolvers = {  # noqa: RUF012 (the base class declares it so)
        first: [rule for rule in rules if rule[0].rpartition(":")[2] in ("null", "merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call, unused-ignore]
        place = str(event.start_mark).strip()
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise ConfigError(f"anchors, aliases and tags are not read: {place}; write the value itself")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ConfigError(f"sections are nested more than {_DEEPEST} deep: {place}; remove some")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"a key is no word: {str(key_node.start_mark).strip()}; mend it")
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"key {key!r} stands twice: {str(key_node.start_mark).strip()}; remove one")
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]{1,18}", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _parse(text: str, source: str) -> Any:
    if len(text) > _LONGEST:
        raise ConfigError(f"{source} has more than {_LONGEST} characters, which is no configuration")
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{source}: {' '.join(str(error).split())}") from None
    # The others are Python's, about digits or an escaped character that cannot be.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def _sections(text: str, source: str) -> dict[str, Any]:
    data = _parse(text, source)
    if not isinstance(data, dict | None):
        raise ConfigError(f"{source} should hold sections such as `run:`, not a {type(data).__name__}")
    return data or {}


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        asked = f", named as base in {seen[-1]}" if seen else ""
        raise FileNotFoundError(f"there is no configuration file {path}{asked}; check the path")
    if path.resolve() in seen:
        raise ConfigError(f"{path} is its own base ({' -> '.join(p.name for p in seen)}); break the circle")
    with open(path, encoding="utf-8") as file:
        try:
            text = file.read(_LONGEST + 1)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not text in UTF-8: {error}") from None
    data = _sections(text, str(path))
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ConfigError(f"base should be a file name, not {base!r} (in {path})")
    return _merge(_read(path.parent / base, (*seen, path.resolve())), data)


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"override {text!r} should look like section.key=value")
        level = tree
        for part in parts[:-1]:
            following = level.setdefault(part, {})
            if not isinstance(following, dict):
                raise ConfigError(f"override {text!r} contradicts an earlier one that sets {part} as a whole")
            level = following
        level[parts[-1]] = _parse(value, f"override {text!r}")
    return tree


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for section, new in change.items():
        old = merged.get(section)
        if not isinstance(old, dict) or not isinstance(new, dict):
            merged[section] = new
        else:
            default = _default_name(section) if section in _CHOICES else None
            now = old.get("name", default)
            afresh = section in _CHOICES and new.get("name", now) != now
            merged[section] = new if afresh else _merge_keys(old, new)
    return merged


def _merge_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A section changed key by key; a guide within a guide, too, unless it gets another name."""
    merged = {**old, **new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            same = value.get("name", before.get("name")) == before.get("name")
            merged[key] = {**before, **value} if same else value
    return merged


def _explain(error: ValidationError, data: Mapping[str, Any]) -> str:
    """One sentence on one error; a misspelt key goes first, for it is the cause of a missing one."""
    details = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    first = details[0]
    if first["type"] == "json_invalid":
        return "a text holds what is no Unicode"
    place = [str(part) for part in first["loc"]]
    if place and place[0] in _CHOICES and len(place) > 1:
        del place[1]  # pydantic inserts the chosen name
    key = ".".join(place)
    kind = first["type"]
    if kind == "extra_forbidden":
        valid = _valid_keys(data)
        siblings = [k for k in valid if k.split(".")[:-1] == place[:-1]]
        ours = _ELSEWHERE.get(place[-1])
        near = [k for k in [*siblings, *valid] if k.split(".")[-1] == ours]
        near = near or difflib.get_close_matches(key, siblings, n=1)
        near = near or [k for k in valid if k.split(".")[-1] == place[-1]]
        return f"{key} is not a known key; " + (
            f"did you mean {near[0]}?" if near else f"valid here: {', '.join(siblings) or 'nothing'}"
        )
    if kind == "union_tag_invalid":
        return f"{key}.name should be {_names(key)}, not {first['ctx']['tag']!r}"
    if kind == "missing":
        return f"{key} is missing; give it in the file or as an override"
    if kind == "value_error":
        return str(first["ctx"]["error"])
    expected = first["msg"].removeprefix("Input ")
    if kind in ("model_type", "model_attributes_type"):
        expected = "should be a section with keys"
    return f"{key} {expected}, not {first['input']!r:.200}"


def _default_name(section: str) -> str:
    return str(Config.model_fields[section].default.name)


def _names(section: str) -> str:
    *names, last = (str(choice.model_fields["name"].default) for choice in _CHOICES[section])
    return f"{', '.join(names)} or {last}"


def _valid_keys(data: Mapping[str, Any]) -> list[str]:
    keys = []
    for section, field in Config.model_fields.items():
        keys.append(section)
        given = data.get(section)
        chosen: list[Any] = [field.annotation]
        if section in _CHOICES:  # of which a wrong name chooses none
            name = given["name"] if isinstance(given, dict) else _default_name(section)
            chosen = [c for c in _CHOICES[section] if c.model_fields["name"].default == name]
        keys += [f"{section}.{key}" for choice in chosen for key in choice.model_fields]
    return keys
