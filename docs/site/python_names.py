"""A page for each public name of the loader, from its docstring."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from page import Page, children, first_line, heading
from sphinx.pycode import ModuleAnalyzer

import dali_views

MODULES = (
    *("plan.recipes", "maps.heatmap", "maps.boxes", "maps.weights", "maps.coordinates"),
    *("data.bad_list", "tools.check", "tools.pack"),
)
"""Modules all of whose public functions and classes are for users, beside what `dali_views` itself names."""


def pages() -> Iterator[Page]:
    """A page for the package and for each module, and below it one for each of its names.

    Raises:
        ValueError: A public name or member has no docstring.
    """
    values = {name: getattr(dali_views, name) for name in dali_views.__all__}
    modules = {name: import_module(f"dali_views.{name}") for name in MODULES}
    own = {name: value for name, value in values.items() if not inspect.ismodule(value)}
    yield from _with_names(dali_views, own, modules)
    for module in modules.values():
        yield from _with_names(module, _public(module))


def _public(module: ModuleType) -> dict[str, Any]:
    """Functions and classes that a module defines for others, in the order of its source."""
    own = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and f"{value.__module__}.".startswith(f"{module.__name__}.")
    }
    return {name: value for name, value in own.items() if name in getattr(module, "__all__", own)}


def _with_names(
    module: ModuleType, names: Mapping[str, Any], modules: Mapping[str, ModuleType] | None = None
) -> Iterator[Page]:
    full = module.__name__
    text = heading(full) + f".. automodule:: {full}\n   :no-members:\n\n"
    text += f".. currentmodule:: {full}\n\n"
    for name, value in names.items():
        text += f":doc:`{name} <{full}.{name}>`\n   {first_line(value, f'{full}.{name}')}\n\n"
        yield Page(f"reference/{full}.{name}.rst", _of_name(full, name, value))
    for name, value in (modules or {}).items():
        text += f":doc:`{name} <{full}.{name}>`\n   {first_line(value, f'{full}.{name}')}\n\n"
    text += children([f"{full}.{name}" for name in names])
    yield Page(f"reference/{full}.rst", text, top=True)


def _of_name(module: str, name: str, value: Any) -> str:
    text = heading(name) + f".. currentmodule:: {module}\n\n"
    if inspect.isfunction(value):
        return f"{text}.. autofunction:: {name}\n"
    if not inspect.isclass(value):
        raise ValueError(f"{module}.{name} is neither a function nor a class; its page cannot be made")
    others = [base.__name__ for base in value.__mro__ if not base.__module__.startswith("dali_views")]
    _check_members(value)
    if issubclass(value, Exception):
        return f"{text}.. autoexception:: {name}\n   :show-inheritance:\n"
    text += f".. autoclass:: {name}\n   :members:\n   :special-members: __len__, __iter__\n"
    return f"{text}   :inherited-members: {', '.join(others)}\n"


def _check_members(kind: type) -> None:
    """Refuses a class with a public member of ours that has no docstring.

    Raises:
        ValueError: It names the member.
    """
    for base in kind.__mro__:
        if not base.__module__.startswith("dali_views"):
            continue
        told = ModuleAnalyzer.for_module(base.__module__).find_attr_docs()
        annotated = set(vars(base).get("__annotations__", {}))
        for name in {*vars(base), *annotated}:
            if name.startswith("_") or (base.__qualname__, name) in told:
                continue
            value = vars(base).get(name)
            written = inspect.isroutine(value) or isinstance(value, property)
            first_line(value if written else "", f"{base.__module__}.{base.__qualname__}.{name}")
