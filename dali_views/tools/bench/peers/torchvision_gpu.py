"""torchvision on the GPU: nvJPEG through `decode_jpeg`, then its transforms image by image."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, decode_jpeg, encode_jpeg, read_file

from ..contender import Batches, Contender, Setup
from .data_loader import endless_rows
from .torchvision_v2 import blur_note, opened, transform

NEEDS: tuple[str, ...] = ()
_AHEAD = 2  # batches whose files are read while the GPU works
_JPEG = [0xFF, 0xD8]  # how a JPEG begins


def contenders(setup: Setup) -> list[Contender]:
    """None where there is no GPU."""
    if not torch.cuda.is_available():
        return []

    def start() -> Batches:
        return batches(setup, torch.device("cuda"))

    note = "; ".join(filter(None, ["transforms image by image", blur_note(setup.views)]))
    return [Contender("torchvision GPU", "peer", "gpu", start, len(setup.views), note)]


def batches(setup: Setup, device: torch.device) -> Batches:
    """Threads read files; this thread decodes and transforms them on the device."""
    probe = encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))
    decode_jpeg(probe, ImageReadMode.RGB, device)  # a torchvision without nvJPEG fails here, aloud
    transforms = [transform(view) for view in setup.views]
    rows = endless_rows(setup)
    with ThreadPoolExecutor(setup.workers) as pool:
        reading: deque[list[Future[Tensor]]] = deque()
        while True:
            while len(reading) <= _AHEAD:
                paths = [setup.index.path(row) for row in islice(rows, setup.batch_size)]
                reading.append([pool.submit(read, path) for path in paths])
            images = decoded([file.result() for file in reading.popleft()], device)
            views = [torch.stack([change(image) for image in images]) for change in transforms]
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield len(views[0])


def read(path: str) -> Tensor:
    """The bytes of a JPEG, (n,); of any other format the pixels, (3, H, W), decoded here on the CPU."""
    data: Tensor = read_file(path)
    return data if data[:2].tolist() == _JPEG else opened(path)


def decoded(files: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """uint8 (3, H, W) on the device, all JPEGs in one call; on the CPU if it refuses one, such as CMYK."""
    jpegs = [file for file in files if file.ndim == 1]
    try:
        pixels = iter(decode_jpeg(jpegs, ImageReadMode.RGB, device) if jpegs else [])
    except RuntimeError:
        pixels = iter([decode_image(file, ImageReadMode.RGB).to(device) for file in jpegs])
    return [next(pixels) if file.ndim == 1 else file.to(device) for file in files]
