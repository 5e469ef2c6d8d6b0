"""check: every image of a data set decoded once by the loader's decoder, before a run stumbles over it."""

from __future__ import annotations

from typing import Any

import numpy as np
from tqdm import tqdm

from . import pipeline, place
from .index import SampleIndex
from .quarantine import why

__all__ = ["check"]


def check(
    index: SampleIndex,
    *,
    device: str = "gpu",
    batch_size: int = 64,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Decodes all images of an index of files.

    Decoders forgive some damage: a flipped bit in the middle of a JPEG is a stain, not an error. What passes
    here passes in the loader on the same kind of device.

    Args:
        device: ``"gpu"`` or ``"cpu"``, whose decoder is asked.
        batch_size: images decoded at a time; memory grows with it.
        threads: CPU threads, by default one per core.
        progress: Shows a bar on a terminal.

    Returns:
        Reasons by full path of the files that cannot be decoded.

    Raises:
        TypeError: The index is one of arrays.
        RuntimeError: ``"gpu"`` is asked for where there is none.
    """
    device_id = place.torch_device(device).index
    refused: dict[str, str] = {}
    graph: Any = None
    with tqdm(
        total=len(index), desc="check", unit=" images", delay=1, disable=None if progress else True
    ) as bar:
        for start in range(0, len(index), batch_size):
            rows = np.arange(start, min(start + batch_size, len(index)))
            graph = graph or pipeline.decoder(
                batch_size, threads or pipeline.default_threads(), device, device_id
            )
            try:
                graph.run(path=index.path_rows(rows))
            except RuntimeError:
                paths = [index.path(row) for row in rows.tolist()]
                refused |= pipeline.undecodable(paths, device, device_id)
                graph = None  # a graph that failed may not be used again
            bar.update(len(rows))
            bar.set_postfix(bad=len(refused), refresh=False)
    return {path: why(path, told) for path, told in refused.items()}
