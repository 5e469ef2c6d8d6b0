"""dali-views check: decodes every image of a data set once, as the loader does, before a run needs it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data import bad_list
from ..data.index import SampleIndex
from . import options
from .command_line import Answer

__all__ = ["check"]

EXAMPLES = """
dali-views check photos --out bad.txt
dali-views index photos --leave-out bad.txt
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    options.add_images(parser)
    options.add_device(parser)
    number = options.at_least(1)
    parser.add_argument("--out", type=Path, default=Path("bad.txt"), help="list to write (bad.txt)")
    parser.add_argument("--batch-size", type=number, default=64, help="images decoded at a time (64)")
    parser.add_argument("--workers", type=number, help="CPU threads (default: all cores)")


def run(args: argparse.Namespace) -> Answer:
    """Writes the list of all that cannot be used; exit code 1 if there is any."""
    index = options.open_index(args)
    print(index.summary())
    refused = check(index, device=options.device(args), batch_size=args.batch_size, threads=args.workers)
    for path, reason in refused.items():
        print(f"  {path}: {reason}")
    bad = {os.path.join(index.root, path): reason for path, reason in index.left_out} | refused
    for row in range(len(index)):  # what is left out only because it is listed twice is good
        if (path := index.path(row)) not in refused:
            bad.pop(path, None)
    bad_list.save(args.out, bad)
    good = len(index) - len(refused)
    text = (
        f"{good} images decoded, {len(refused)} not, {len(index.left_out)} left out before\n"
        f"{args.out}: the {len(bad)} that cannot be used, for --leave-out and data.leave_out"
    )
    facts = {"decoded": good, "undecodable": refused, "bad": bad, "out": args.out}
    return Answer(facts, text, int(bool(bad)))


def check(
    index: SampleIndex,
    *,
    device: str = "gpu",
    batch_size: int = 64,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Decodes all images of an index of files, shards or a source.

    Decoders tolerate some damage: a flipped bit in the middle of a JPEG is a stain, not an error. An image
    that passes here passes in the loader on the same kind of device.

    Args:
        device: ``"gpu"`` or ``"cpu"``, whose decoder is used.
        batch_size: images decoded at a time; memory grows with it.
        threads: CPU threads, by default one per core.
        progress: Shows a bar on a terminal.

    Returns:
        Reasons by full path of the images that cannot be decoded.

    Raises:
        TypeError: The index is one of arrays.
        BadImageError: The folder of the images, or their source, is gone.
        RuntimeError: There is no GPU for ``"gpu"``, its memory is full even for one image, or the decoder
            refuses a sound image, too.
    """
    # Not at the top: the other commands, and help, start without DALI and PyTorch.
    from ..graph.build import default_threads
    from ..graph.decode import decoder
    from ..loader.quarantine import undecodable
    from ..system.ranks import torch_device

    if index.form == "pixels":
        raise TypeError("The images of an index of arrays are decoded; there is nothing to check.")
    device_id = torch_device(device).index
    threads = threads or default_threads()
    refused: dict[str, str] = {}
    graph: Any = None
    hidden = None if progress else True
    with tqdm(total=len(index), desc="check", unit=" images", delay=1, disable=hidden) as bar:
        for start in range(0, len(index), batch_size):
            rows = np.arange(start, min(start + batch_size, len(index)))
            graph = graph or decoder(batch_size, threads, device, device_id)
            try:
                graph.run(images=index.inputs(rows))
            except Exception:  # DALI's RuntimeError, or the source's own
                found = undecodable(index, rows, device, device_id)
                refused |= {index.path(row): reason for row, reason in found.items()}
                graph = None  # a graph that failed must not be used again
            bar.update(len(rows))
            bar.set_postfix(bad=len(refused), refresh=False)
    return refused
