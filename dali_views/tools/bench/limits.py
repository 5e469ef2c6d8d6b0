"""The most that any loader on these readers and decoders could reach: the graph, cut short."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, types

from ...graph import decode
from ...graph.build import PREFETCH
from .contender import Batches, Contender, Setup

_LOADS = (0.0, 0.5, 0.8, 1.0)
READ, DECODE, RESIZE = "read only", "decode only", "decode + one resize"


def contenders(setup: Setup) -> list[Contender]:
    """Reading alone; reading and decoding; both and one resize of the whole image to the view's size.

    On a GPU decoding also by other shares of the hardware decoder, for the best one differs between GPUs.
    """
    size = setup.views[0].size
    decoded = partial(decode.decode, device=setup.device, hw_decoder_load=setup.hw_decoder_load)
    stages: dict[str, Callable[[Any], Any]] = {
        READ: lambda encoded: encoded,
        DECODE: decoded,
        RESIZE: lambda encoded: fn.resize(decoded(encoded), size=[size, size]),
    }
    for load in _LOADS if setup.device == "gpu" else ():
        stages[f"{DECODE}, hardware {load:.0%}"] = partial(decode.decode, device="gpu", hw_decoder_load=load)
    where = {READ: "cpu"}
    return [
        Contender(name, "limit", where.get(name, setup.device), partial(_batches, setup, cut), 0)
        for name, cut in stages.items()
    ]


def _batches(setup: Setup, cut: Callable[[Any], Any]) -> Batches:
    order = np.random.default_rng(setup.seed).permutation(len(setup.index))
    turn = 0

    def source() -> Any:
        nonlocal turn
        turn += 1
        return setup.index.inputs(
            np.take(order, np.arange(setup.batch_size) + turn * setup.batch_size, mode="wrap")
        )

    graph = Pipeline(
        batch_size=setup.batch_size,
        num_threads=setup.workers,
        device_id=0 if setup.device == "gpu" else None,
        prefetch_queue_depth=PREFETCH,
        seed=0,
    )
    with graph:
        images = fn.external_source(source, batch=True, dtype=types.UINT8, ndim=1)
        graph.set_outputs(cut(decode.read(images, setup.index.form)))
    graph.build()
    while True:
        graph.run()
        yield setup.batch_size
