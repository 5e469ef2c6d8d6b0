"""Where a run computes, and in which precision."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from trainers.config import Run
from trainers.engine.setting import _precision


@pytest.mark.parametrize(
    ("major", "half"), [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16), (12, torch.bfloat16)]
)
def test_auto_takes_bfloat16_where_the_gpu_computes_in_it_not_where_it_only_emulates(
    major: int, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    # As any GPU with a recent driver does, one of capability 7 accepts tensors of this type.
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True, raising=False)
    assert _precision(Run(out="runs/a").amp, torch.device("cuda")) is half
    assert _precision("bf16", torch.device("cuda")) is torch.bfloat16
    assert _precision("auto", torch.device("cpu")) is None
