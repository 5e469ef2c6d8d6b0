"""Where the processes of one attempt meet: a corner of torchrun's store that no earlier attempt has used.

The store may outlive the processes that torchrun restarts. In it lie the addresses of the dead, and whoever
is quicker than the rank that writes a new one would call there.
"""

from __future__ import annotations

import secrets
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

__all__ = ["fresh_store"]


def fresh_store(store: Store, rank: int, world: int, timeout: timedelta) -> Store:
    """A view of `store`, the same on all ranks, that is empty; called on all ranks at the same time.

    Rank 0 draws its name. To get it, the others leave questions that only this attempt's rank 0 can answer.

    Raises:
        TimeoutError: on rank 0, if not all others have come in time.
    """
    if rank > 0:
        question = secrets.token_hex(8)
        store.set(f"question/{rank}", question)
        name = store.get(f"answer/{question}").decode()  # waits
        store.add(f"{name}/met", 1)
        return PrefixStore(name, store)
    name, deadline = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    while (met := store.add(f"{name}/met", 0)) < world - 1:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {1 + met} of {world} processes have come; see what the others say")
        for other in range(1, world):
            if store.check([f"question/{other}"]):
                store.set(f"answer/{store.get(f'question/{other}').decode()}", name)
        time.sleep(0.02)
    return PrefixStore(name, store)
