"""What a configuration may say: every key with its type, default and meaning, read off the classes."""

from __future__ import annotations

import json
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from . import CHOICES, Config, ConfigError
from .sections import Section

__all__ = ["listed", "table"]


def listed(section: str | None = None) -> list[dict[str, Any]]:
    """The keys of a section such as "optim", or of one of its choices, "optim.lars"; all without a section.

    Returns:
        For each key its name, "of" (the choice that has it, or None), type, default and meaning; the default
        of a key that must be given is "(to be given)".

    Raises:
        ConfigError: there is no such section or choice.
    """
    wanted, _, choice = (section or "").partition(".")
    if wanted and (wanted not in Config.model_fields or (choice and choice not in CHOICES.get(wanted, ()))):
        known = (
            list(Config.model_fields) if wanted not in Config.model_fields else list(CHOICES.get(wanted, ()))
        )
        raise ConfigError(f"there is no section {section}; known: {', '.join(known) or 'no choices here'}")
    found: list[dict[str, Any]] = []
    for name, field in Config.model_fields.items():
        if wanted in ("", name):
            for chosen, kind in CHOICES.get(name, {None: field.annotation}).items():
                if choice in ("", chosen):
                    found += _keys(name, chosen, kind)
    return found


def table(keys: list[dict[str, Any]]) -> str:
    """Keys as text: `section.key: type = default`, and what it means."""
    lines, last = [], ""
    for key in keys:
        if key["of"] and key["of"] != last:
            lines.append(f"\n{key['name'].partition('.')[0]}.name = {key['of']}")
        last = key["of"]
        lines.append(f"{key['name']}: {key['type']} = {key['default']}")
        lines += textwrap.wrap(key["meaning"], 100, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines).lstrip("\n")


def _keys(prefix: str, choice: str | None, kind: Any) -> Iterator[dict[str, Any]]:
    for name, field in kind.model_fields.items():
        if not (choice and name == "name"):
            yield {
                "name": f"{prefix}.{name}", "of": choice, "type": _type(field.annotation),
                "default": _default(field), "meaning": " ".join((field.description or "").split()),
            }  # fmt: skip


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(to be given)"
    value = field.get_default(call_default_factory=True)
    return json.dumps(value, default=lambda section: {"name": section.name}).replace('"', "")


def _type(kind: Any) -> str:
    """A type in the words of a file."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(str(each) for each in args)
    if origin in (Union, types.UnionType):
        parts = [_type(each) for each in args]
        return " | ".join(dict.fromkeys(parts))
    if origin is tuple:
        return f"[{', '.join(_type(each) if each is not ... else '...' for each in args)}]"
    if origin is not None and hasattr(kind, "__metadata__"):
        return _type(args[0])
    if kind is type(None):
        return "null"
    if isinstance(kind, type) and issubclass(kind, Section):
        return (
            f"a guide: {kind.model_fields['name'].default}" if "name" in kind.model_fields else kind.__name__
        )
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", dict: "keys"}
    return names.get(origin or kind, re.sub(r"^typing\.", "", str(kind)))
