"""Memory of tensors, counted exactly on any device: what their storages hold, not what the process does."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Sums the storages that operators make inside and that are still alive; `peak` is their greatest sum.

    What an operator takes for itself while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(each)._cdata for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
        result = func(*args, **(kwargs or {}))
        for storage in (_storage(each) for each in tree_leaves(result) if torch.is_tensor(each)):
            name, size = storage._cdata, storage.nbytes()
            if name not in given | self._alive:  # neither a view of what came in nor counted before
                self._alive.add(name)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, name, size)
        return result

    def _freed(self, name: int, size: int) -> None:
        self._alive.discard(name)
        self.now -= size


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
