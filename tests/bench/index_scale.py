"""What an index of ImageNet's size costs to load: seconds and resident memory, with made-up rows.

python tests/bench/index_scale.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dali_views import SampleIndex

ROWS = 1_281_167


def make(path: Path) -> None:
    """Save an index of ImageNet-like paths, sizes and labels."""
    draw = np.random.default_rng(0)
    label = np.sort(draw.integers(0, 1000, ROWS))
    names = [f"n{c:08d}/n{c:08d}_{i}.JPEG".encode() for i, c in enumerate(label)]
    longest = max(map(len, names))
    paths = np.array(names, f"S{longest}").view(np.uint8).reshape(ROWS, longest)
    sizes = draw.integers(200, 600, (ROWS, 2)).astype(np.int32)
    classes = [f"n{c:08d}" for c in range(1000)]
    SampleIndex("/data/imagenet/train", paths, sizes, label.astype(np.int32), classes).save(path)


def resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    if len(sys.argv) > 1:  # the child: load, and nothing else
        before, began = resident(), time.perf_counter()
        index = SampleIndex.load(sys.argv[1])
        print(f"{len(index)} rows in {time.perf_counter() - began:.2f} s, {resident() - before:.0f} MB")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.npz")
        make(path)
        print(f"file of {path.stat().st_size / 1e6:.0f} MB")
        for _ in range(3):
            subprocess.run([sys.executable, __file__, str(path)], check=True)


if __name__ == "__main__":
    main()
