"""What a checkpoint gives back: every part is checked against the one that it is for, then all are assigned.

A part is a module, an optimiser, a gradient scaler, or has a `form` (tables, loaders, guides). For forms see
`dali_views.system.stored`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dali_views.system import stored
from dali_views.system.stored import Form, entries, number, numbers, sequence, whole

__all__ = ["REMEDY", "form_of", "restore"]

REMEDY = (
    "it is damaged, or of another version or configuration; finish the run with that one, or begin it again "
    "in another run.out"
)
_STATE = {"SGD": ("momentum_buffer",), "AdamW": ("step", "exp_avg", "exp_avg_sq"), "Lars": ("velocity",)}
"""What each optimiser keeps of a parameter that has had a gradient."""
_SINCE = {"foreach", "maximize", "capturable", "differentiable", "fused", "amsgrad", "nesterov",
          "decoupled_weight_decay", "lr_factor"}  # fmt: skip
"""Options that have a default, for a version that did not have them yet."""


def restore(
    saved: Mapping[str, Any], parts: Mapping[str, Any], more: Mapping[str, Form] | None = None,
    agree: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Put the states of `parts` back into them; an empty state (of an unused gradient scaler) is left out.

    Args:
        more: forms of further entries of the checkpoint.
        agree: called before anything is assigned, with all entries; it raises an error if they contradict
            each other.

    Returns:
        The entries as their forms return them.

    Raises:
        ValueError: one is missing or does not fit, in a sentence that names it; nothing was changed.
        FloatingPointError: weights, or what an optimiser keeps of them, are NaN or infinite; the same.
    """
    forms = {**(more or {}), **{name: form_of(part) for name, part in parts.items()}}
    found: dict[str, Any] = stored.check(saved, entries(forms), "the checkpoint", REMEDY)
    if agree is not None:
        agree(found)
    for name, part in parts.items():
        if saved[name] != {}:
            part.load_state_dict(saved[name])
    return found


def form_of(part: Any) -> Form:
    """What `load_state_dict` of a part takes."""
    if isinstance(part, nn.Module):
        return stored.alike(part.state_dict())
    if isinstance(part, Optimizer):
        return _optimizer(part)
    if isinstance(part, torch.amp.GradScaler):
        return _scaler
    form: Form = part.form()
    return form


def _scaler(value: Any, place: str) -> Any:
    """The form of a gradient scaler: empty if it was not used, for example on another kind of device."""
    if value == {}:
        return value
    factors = {"scale": number(0), "growth_factor": number(0), "backoff_factor": number(0)}
    return entries({**factors, "growth_interval": whole(1), "_growth_tracker": whole(0)})(value, place)


def _optimizer(optimizer: Optimizer) -> Form:
    own = optimizer.state_dict()["param_groups"]
    groups = sequence([entries(*_group(group)) for group in own])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = _STATE[type(optimizer).__name__]

    def state(value: Any, place: str) -> Any:
        stored.each(whole(0, len(parameters) - 1), lambda item, where: item)(value, place)
        for index, parameter in enumerate(parameters):
            like = numbers(tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."), finite=True)
            forms = {
                name: numbers((), "float32", True, 0, stored.MOST) if name == "step" else like
                for name in kept
            }
            # Without a gradient so far, as of frozen layers, there is none.
            if index in value:
                entries(forms, only=True)(value[index], f"{place}.{index}")
        return value

    return entries({"param_groups": groups, "state": state})


def _group(own: Mapping[str, Any]) -> tuple[dict[str, Form], dict[str, Form]]:
    """Forms of the options of a parameter group, and of those that may be missing."""

    def parameters(value: Any, place: str) -> Any:
        if value != own["params"]:
            raise stored.unfit(place, value, f"the numbers of {len(own['params'])} parameters")
        return value

    def like(option: Any) -> Form:
        if option is None or isinstance(option, bool):
            return stored.switch
        return sequence([number()] * len(option)) if isinstance(option, (list, tuple)) else number()

    forms = {name: like(option) for name, option in own.items() if name != "params"}
    optional = {name: form for name, form in forms.items() if name in _SINCE}
    return {"params": parameters, **{n: f for n, f in forms.items() if n not in _SINCE}}, optional
