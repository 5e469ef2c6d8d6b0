"""The most that any loader on these readers and decoders could reach: the graph, cut short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, types

from .. import pipeline
from .contender import Batches, Contender, Setup

READ, DECODE, RESIZE = "read only", "decode only", "decode + one resize"


def contenders(setup: Setup) -> list[Contender]:
    """Reading alone; reading and decoding; both and one resize of the whole image to the view's size."""
    size = setup.views[0].size
    stages: dict[str, Callable[[Any], Any]] = {
        READ: pipeline.read,
        DECODE: lambda path: pipeline.decoded(path, setup.device, setup.hw_decoder_load),
        RESIZE: lambda path: fn.resize(
            pipeline.decoded(path, setup.device, setup.hw_decoder_load), size=[size, size]
        ),
    }
    where = {READ: "cpu"}
    return [
        Contender(name, "limit", where.get(name, setup.device), lambda cut=cut: _batches(setup, cut), 0)  # type: ignore[misc]
        for name, cut in stages.items()
    ]


def _batches(setup: Setup, cut: Callable[[Any], Any]) -> Batches:
    draw = np.random.default_rng(setup.seed)

    def source() -> Any:
        return setup.index.path_rows(draw.integers(0, len(setup.index), setup.batch_size))

    graph = Pipeline(
        batch_size=setup.batch_size,
        num_threads=setup.workers,
        device_id=0 if setup.device == "gpu" else None,
        prefetch_queue_depth=pipeline.PREFETCH,
        seed=0,
    )
    with graph:
        path = fn.external_source(source, batch=True, dtype=types.UINT8, ndim=1)
        graph.set_outputs(cut(path))
    graph.build()
    while True:
        graph.run()
        yield setup.batch_size
