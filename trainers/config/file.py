"""Configuration files: YAML in, a checked and frozen `Config` out, or one sentence that names the wrong key.

    config = load("configs/demo.yaml", ["optim.lr=0.1", "method.name=moco"])
    config = load(["configs/cifar10/simclr.yaml", "configs/data/stl10.yaml"])

A file may be a short diff: `base: other.yaml` names the file it changes, relative to itself; `base: [a.yaml,
b.yaml]` names several, merged in this order. Where `name` chooses a section (`method`, `guide`, `optim`),
a new name starts the section afresh: keys of the old choice do not leak into the new one. A section without a
name keeps the default choice.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from . import DEFAULTS, Config, ConfigError, check

__all__ = ["ConfigError", "differences", "dump", "load", "override", "parse", "plain"]

_BROUGHT = Path(__file__).resolve().parents[1] / "configs"
_LONGEST = 50_000  # characters of a file; the longest of ours has some thousand
_DEEPEST = 20  # sections and lists inside each other


def load(files: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Read YAML files and their bases, apply overrides and check the result.

    Args:
        files: a YAML file, several merged in order, or names joined by "+". A file below configs/ that does
            not exist is the one of that name in the package, if there is one. `run.out`, if absent, is made
            of the names: runs/cifar10/simclr-stl10.
        overrides: "section.key=value"; the value is read as YAML, the last one wins.
    """
    given = [files] if isinstance(files, str | Path) else files
    paths = [Path(name) for file in given for name in str(file).replace(".yaml+", ".yaml\n").split("\n")]
    if not paths:
        raise ConfigError("there is no configuration; give at least one file")
    tree: dict[str, Any] = {}
    for path in paths:
        tree = _merge(tree, _read(_found(path), ()))
    changes = _parse_overrides(overrides)
    tree = _merge(tree, changes)
    if isinstance(run := tree.setdefault("run", {}), dict):
        first = paths[0].parts[paths[0].parts.index("configs") + 1 :] if "configs" in paths[0].parts else ()
        name = Path(*first or (paths[0].name,)).with_suffix("")
        run.setdefault("out", "-".join([f"runs/{name}", *(path.stem for path in paths[1:])]))
    return check(tree, "+".join(map(str, paths)), changes)


def override(
    config: Config, overrides: Sequence[str], files: Sequence[str | Path] = (),
    afresh: Mapping[str, Any] | None = None,
) -> Config:  # fmt: skip
    """A configuration with some values changed, by files and then by overrides, checked as by `load`.

    Sections in `afresh` are replaced by these values first.
    """
    tree = config.model_dump(mode="json") | dict(afresh or {})
    for file in files:
        tree = _merge(tree, _read(_found(Path(file)), ()))
    given = _parse_overrides(overrides)
    return check(_merge(tree, given), "+".join(map(str, files)) or "the run's configuration", given)


def parse(text: str) -> Config:
    """The configuration that `dump` wrote, checked as by `load`."""
    if not isinstance(text, str):
        raise ConfigError(f"the stored configuration is not text but a {type(text).__name__}")
    return check(_sections(text, "the stored configuration"), "the stored configuration")


def dump(config: Config) -> str:
    """The whole configuration as YAML text, defaults included; `load` of it gives an equal Config."""
    yaml, text = _yaml(), io.StringIO()
    yaml.dump(config.model_dump(mode="json"), text)
    return text.getvalue()


def plain(file: str | Path) -> dict[str, Any]:
    """The values of a YAML file with its bases, unchecked; for what is no configuration of a run."""
    return _read(_found(Path(file)), ())


def differences(one: Config, other: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configurations differ, in order, with the values of both (None: has none)."""
    flat = [_flat(config.model_dump(mode="json")) for config in (one, other)]
    values = {key: (flat[0].get(key), flat[1].get(key)) for key in sorted(flat[0].keys() | flat[1].keys())}
    return {key: (old, new) for key, (old, new) in values.items() if old != new}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {name: each for k in value for name, each in _flat(value[k], f"{key}.{k}".lstrip(".")).items()}


def _found(path: Path) -> Path:
    """The file, or the package's own below configs/: an installed package has no checkout around it."""
    packaged = _BROUGHT.joinpath(*path.parts[1:])
    ours = path.parts[:1] == ("configs",) and not os.path.isfile(path) and os.path.isfile(packaged)
    return packaged if ours else path


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        where = f", named as base in {seen[-1]}" if seen else ""
        hint = "" if path.suffix in (".yaml", ".yml") else "; a key is changed by section.key=value"
        raise FileNotFoundError(f"there is no configuration file {path}{where}; check the path{hint}")
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
    tree = _parse(text, source) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} should hold sections such as `run:`, not a {type(tree).__name__}")
    return tree


def _yaml() -> Any:
    yaml = YAML(typ="safe", pure=True)  # YAML 1.2: 1e-4 is a number, off is a word; a key stands once
    yaml.sort_base_mapping_type_on_output, yaml.width = False, 2**20  # type: ignore[assignment]
    return yaml


def _parse(text: str, source: str) -> Any:
    """YAML without aliases, which may stand for more values than memory holds, and without tags."""
    if len(text) > _LONGEST:
        raise ConfigError(f"{source} has more than {_LONGEST} characters, so it is not a configuration")
    depth = 0
    try:
        for event in _yaml().parse(text):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > _DEEPEST or any(getattr(event, part, None) for part in ("anchor", "tag", "version")):
                what = f"anchors, aliases, tags, directives and more than {_DEEPEST} nested sections"
                raise MarkedYAMLError(problem=f"{what} are not read", problem_mark=event.start_mark)
        return _yaml().load(text)
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source} is not valid YAML{line}: {error.problem:.300}") from None
    # The others are Python's, about digits or an escaped character that cannot be.
    except (YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split()):.300}") from None


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        *sections, last = key.strip().split(".")
        if not equals or not all([*sections, last]):
            raise ConfigError(f"override {text!r} should have the form section.key=value")
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
            name = before.get("name", DEFAULTS.get(key))
            afresh = key in (*DEFAULTS, "boxes") and value.get("name", name) != name
            merged[key] = value if afresh else _merge(before, value)
    return merged
