"""check: every image of a data set decoded once by the loader's decoder, before a run stumbles over it."""

from __future__ import annotations

from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.index import SampleIndex
from ..graph import build as pipeline
from ..loader.quarantine import undecodable
from ..system import place

__all__ = ["check"]


def check(
    index: SampleIndex,
    *,
    device: str = "gpu",
    batch_size: int = 64,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Decodes all images of an index of files, shards or a source.

    Decoders forgive some damage: a flipped bit in the middle of a JPEG is a stain, not an error. What passes
    here passes in the loader on the same kind of device.

    Args:
        device: ``"gpu"`` or ``"cpu"``, whose decoder is asked.
        batch_size: images decoded at a time; memory grows with it.
        threads: CPU threads, by default one per core.
        progress: Shows a bar on a terminal.

    Returns:
        Reasons by full path of the images that cannot be decoded.

    Raises:
        TypeError: The index is one of arrays.
        BadImageError: The folder of the images, or their source, is gone.
        RuntimeError: ``"gpu"`` is asked for where there is none, its memory is full even for one image, or
            the decoder refuses a sound image, too.
    """
    if index.form == "pixels":
        raise TypeError("The images of an index of arrays are decoded; there is nothing to check.")
    device_id = place.torch_device(device).index
    refused: dict[str, str] = {}
    graph: Any = None
    with tqdm(
        total=len(index), desc="check", unit=" images", delay=1, disable=None if progress else True
    ) as bar:
        for start in range(0, len(index), batch_size):
            rows = np.arange(start, min(start + batch_size, len(index)))
            graph = graph or pipeline.decoder(
                batch_size, threads or pipeline.default_threads(), device, device_id, index.form
            )
            try:
                graph.run(images=index.inputs(rows))
            except Exception:  # DALI's RuntimeError, or the source's own
                found = undecodable(index, rows, device, device_id)
                refused |= {index.path(row): reason for row, reason in found.items()}
                graph = None  # a graph that failed may not be used again
            bar.update(len(rows))
            bar.set_postfix(bad=len(refused), refresh=False)
    return refused
