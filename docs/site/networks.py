"""The methods and the guides: what they do, from their docstrings, and where their keys are."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import configuration
from page import Page, children, first_line, heading

from trainers import guides, methods


def pages() -> Iterator[Page]:
    """A page for each method and guide that the configuration knows, and one for their interface."""
    yield from _family(methods, methods.Method, "method")
    yield from _family(guides, guides.Guide, "guide")


def _family(package: ModuleType, base: type, section: str) -> Iterator[Page]:
    names = [found.name for found in pkgutil.iter_modules(package.__path__)]
    modules = [import_module(f"{package.__name__}.{name}") for name in names]
    kinds = {
        name: kind
        for module in modules
        for name, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, base) and kind.__module__ == module.__name__
    }
    top = heading(f"{section.capitalize()}s") + f"{first_line(package, package.__name__)}\n\n"
    paths = []
    for choice in configuration.SCHEMA["properties"][section]["oneOf"]:
        name = choice["$ref"].rsplit("/", 1)[1]
        value = configuration.definition(choice)["properties"]["name"]["const"]
        kind = kinds.get(name, base)
        if kind is base:  # nothing of its own: the interface does what it says
            continue
        path = f"{package.__name__}.{value}"
        text = heading(name) + f".. automodule:: {kind.__module__}\n   :no-members:\n   :noindex:\n\n"
        text += f"Chosen by ``{section}.name={value}``; "
        text += f"its keys: :ref:`{section}.{value} <{section}-{value}>`.\n\n"
        text += f".. autoclass:: {kind.__module__}.{name}\n"
        yield Page(f"reference/{path}.rst", text)
        told = configuration.definition(choice)["description"].split("\n")[0]
        top += f":doc:`{name} <{path}>` (``{section}.name={value}``)\n   {told}\n\n"
        paths.append(path)
    path = f"{package.__name__}.{base.__name__}"
    own = heading(f"{base.__name__}: to write your own") + f".. currentmodule:: {package.__name__}\n\n"
    yield Page(f"reference/{path}.rst", own + f".. autoclass:: {base.__name__}\n   :members:\n")
    top += f":doc:`{base.__name__} <{path}>`\n   {first_line(base, base.__name__)}\n\n"
    yield Page(f"reference/{package.__name__}.rst", top + children([*paths, path]), top=True)
