"""Named stages for profilers: NVTX ranges where there is a GPU (Nsight Systems), PyTorch's everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["stage"]


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Show what runs inside as one range; costs a few microseconds."""
    nvtx = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if nvtx:
        torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
