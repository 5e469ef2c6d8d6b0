"""The configuration of a training run: every key with its type, default and docstring, from pydantic."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from page import Page, first_line

from trainers import config as cfg

SCHEMA = cfg.Config.model_json_schema()
_BOUNDS = {
    "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"
}  # fmt: skip
_WORDS = {
    "integer": "whole number", "number": "number", "string": "text", "boolean": "true or false",
    "null": "null",
}  # fmt: skip


def pages() -> Iterator[Page]:
    """A page for each section, and one that leads to them.

    Raises:
        ValueError: A section or key has no docstring.
    """
    sections = SCHEMA["properties"]
    text = (
        "# Configuration\n\nA run is described by a YAML file with these sections; any key can be set on the "
        "command line, as in `optim.lr=0.1`. Files to start from: [configs](../configs/README.md).\n\n"
    )
    for name, section in sections.items():
        text += f"[{name}](configuration.{name}.md)\n: {_told(section, name)}\n\n"
        yield Page(f"reference/configuration.{name}.md", _section(name, section))
    names = "\n".join(f"configuration.{name}" for name in sections)
    text += f"```{{toctree}}\n:hidden:\n:titlesonly:\n\n{names}\n```\n"
    yield Page("reference/configuration.md", text, top=True)


def definition(reference: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a `$ref` of the schema stands for."""
    found: Mapping[str, Any] = SCHEMA["$defs"][reference["$ref"].rsplit("/", 1)[1]]
    return found


def _told(section: Mapping[str, Any], name: str) -> str:
    """What a section is; pydantic leaves that out where the class says the same."""
    return first_line(section.get("description") or definition(section)["description"], name)


def _section(name: str, section: Mapping[str, Any]) -> str:
    text = f"# {name}\n\n{_told(section, name)}\n\n"
    if "oneOf" not in section:
        return text + _keys(name, name, definition(section)["properties"])
    chosen = section.get("default", {}).get("name")
    for choice in section["oneOf"]:
        kind = definition(choice)
        value = kind["properties"]["name"]["const"]
        text += f"({name}-{value})=\n\n## {name}.name={value}\n\n{kind['description']}"
        text += " The default.\n\n" if value == chosen else "\n\n"
        text += _keys(name, f"{name}-{value}", kind["properties"])
    return text


def _keys(section: str, anchor: str, properties: Mapping[str, Any]) -> str:
    text = ""
    for name, key in properties.items():
        if "const" in key:
            continue
        told = first_line(key.get("description", ""), f"{section}.{name} ({anchor})")
        default = f"default `{_plain(key['default'])}`" if "default" in key else "required"
        text += f"[`{section}.{name}`]{{#{anchor}-{name}}}\n: {told}\n\n  *{_type(key)}*, {default}\n\n"
    return text or "It has no keys.\n\n"


def _type(key: Mapping[str, Any]) -> str:
    """The values that a key takes, in words."""
    if "anyOf" in key:
        return " or ".join(_type(each) for each in key["anyOf"])
    if "oneOf" in key:
        return "keys of " + ", ".join(
            definition(each)["properties"]["name"]["const"] for each in key["oneOf"]
        )
    if "enum" in key or "const" in key:
        return ", ".join(key.get("enum", [key.get("const")]))
    if key["type"] == "array":
        parts = [_type(each) for each in key.get("prefixItems", [])]
        if not parts:
            return f"list of {_type(key['items'])}s"
        same = parts[0] if len(set(parts)) == 1 else ", ".join(parts)
        return f"list of {len(parts)}, each {same}"
    bounds = [f"{words} {key[bound]:g}" for bound, words in _BOUNDS.items() if bound in key]
    return f"{_WORDS[key['type']]} {' and '.join(bounds)}".rstrip()


def _plain(value: Any) -> str:
    """A default as one writes it in YAML."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_plain(each) for each in value) + "]"
    return json.dumps(value)
