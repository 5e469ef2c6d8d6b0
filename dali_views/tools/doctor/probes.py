"""What `dali-views doctor` tries out: each probe runs in a process of its own, for it may hang or crash.

`python -m dali_views.tools.doctor.probes NAME ...` prints what it found as one line of JSON. Imports stand
in the probes, so that a package that is missing or broken fails the probes that need it and no other.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_SIDE = 64  # of the image that is decoded, in pixels
_FAR = 8  # grey values that a decoded pixel may be off on average: JPEG loses less on a smooth image

_LISTED = 2.0  # seconds in which images are looked for
_READ = 2.0  # seconds in which they are read
_MOST = 2000  # images read
_READERS = 8
_PIECE = 128 * 1024  # bytes read at a place of a container, about a photograph
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")  # as listing.EXTENSIONS


def driver() -> dict[str, Any]:
    """CUDA version of the driver and its GPUs, asked of the driver itself."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"cuda": "", "gpus": []}

    def ask(function: str, *given: Any) -> int:
        number = ctypes.c_int()
        if code := getattr(cuda, function)(ctypes.byref(number), *given):
            raise RuntimeError(f"{function} fails with CUDA error {code}")
        return number.value

    version = ask("cuDriverGetVersion")
    told = {"cuda": f"{version // 1000}.{version % 1000 // 10}", "gpus": []}
    if (code := cuda.cuInit(0)) == 100:  # there is none, or none is visible
        return told
    if code:
        raise RuntimeError(f"the driver does not start (cuInit fails with CUDA error {code})")
    return {**told, "gpus": [_gpu(cuda, ask, number) for number in range(ask("cuDeviceGetCount"))]}


def _gpu(cuda: ctypes.CDLL, ask: Callable[..., int], number: int) -> dict[str, Any]:
    device = ask("cuDeviceGet", number)
    name, size = ctypes.create_string_buffer(100), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    major, minor = (ask("cuDeviceGetAttribute", attribute, device) for attribute in (75, 76))
    return {"name": name.value.decode(), "bytes": size.value, "capability": f"{major}.{minor}"}


def together() -> dict[str, Any]:
    """DALI's image as a tensor of PyTorch, in one process and on the GPU if PyTorch sees one."""
    import torch
    from torch.utils.dlpack import from_dlpack

    gpu = torch.cuda.is_available()
    images, pixels = _decoded("gpu" if gpu else "cpu")
    _compare(from_dlpack(images.as_tensor())[0].cpu().numpy(), pixels)
    return {"gpu": gpu}


def decode(device: str) -> dict[str, Any]:
    """One image through the loader's decoder, compared with what was encoded."""
    import numpy as np

    images, pixels = _decoded(device)
    _compare(np.asarray((images.as_cpu() if device == "gpu" else images).at(0)), pixels)
    return {}


def _decoded(device: str) -> tuple[Any, Any]:
    """A batch of one image as DALI holds it, and the pixels (S, S, 3) that were encoded."""
    import numpy as np

    from ...graph.decode import decoder

    pixels = _gradient()
    graph = decoder(1, 1, device, 0 if device == "gpu" else None, "bytes")
    (images,) = graph.run(images=[np.frombuffer(_jpeg(pixels), np.uint8)])
    return images, pixels


def _compare(decoded: Any, pixels: Any) -> None:
    if decoded.shape != pixels.shape or abs(decoded.astype(int) - pixels).mean() > _FAR:
        raise RuntimeError("the decoded image is not the one that was encoded")


def hardware() -> dict[str, Any]:
    """Whether the GPU has a decoder for JPEG of its own: one image is given to it alone."""
    from nvidia import nvimgcodec  # the library by which DALI decodes

    kinds = [nvimgcodec.Backend(nvimgcodec.BackendKind.HW_GPU_ONLY)]
    return {"there": nvimgcodec.Decoder(device_id=0, backends=kinds).decode(_jpeg(_gradient())) is not None}


def cache(folder: str) -> dict[str, Any]:
    """Whether a file can be made in a folder, or where the folder would be made; nothing is left there."""
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    with tempfile.TemporaryFile(dir=place):
        return {}


def data(path: str) -> dict[str, Any]:
    """How fast images are read that the page cache was asked to forget; nothing is written.

    Of a folder an even sample of the images found first is read, of a container (a shard, say) pieces at even
    places.
    """
    if path.endswith((".txt", ".csv", ".json")):
        raise ValueError("this is a list; give the folder of its images")
    found = list(_pieces(path) if os.path.isfile(path) else _files(path, time.perf_counter() + _LISTED))
    jobs = found[:: max(1, -(-len(found) // _MOST))]
    began = time.perf_counter()

    def read(job: tuple[str, int, int]) -> int:
        if time.perf_counter() - began > _READ:
            return -1
        name, start, count = job
        with open(name, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), start, max(count, 0), os.POSIX_FADV_DONTNEED)
            file.seek(start)
            return len(file.read(count))

    with ThreadPoolExecutor(_READERS) as threads:
        counts = [count for count in threads.map(read, jobs) if count >= 0]
    return {"images": len(counts), "bytes": sum(counts), "seconds": time.perf_counter() - began}


def _files(folder: str, until: float) -> Iterator[tuple[str, int, int]]:
    """Image files below a folder, each as a whole, as many as are found in time."""
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if time.perf_counter() > until:
                    return
                if entry.is_dir():
                    waiting.append(entry.path)
                elif entry.name.lower().endswith(_SUFFIXES) and entry.is_file():
                    yield entry.path, 0, -1


def _pieces(file: str) -> Iterator[tuple[str, int, int]]:
    """Places of a container, at least so far apart that they are no more than `_MOST`."""
    size = os.path.getsize(file)
    for start in range(0, size, max(_PIECE, -(-size // _MOST))):
        yield file, start, _PIECE


def _gradient() -> Any:
    """(S, S, 3) uint8, smooth, with different channels."""
    import numpy as np

    ramp = np.linspace(0, 255, _SIDE)
    across, down = np.meshgrid(ramp, ramp)
    return np.stack([across, down, 255 - across], 2).astype(np.uint8)


def _jpeg(pixels: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    probe.__name__: probe for probe in (driver, together, decode, hardware, cache, data)
}


def main() -> None:
    """Run one probe; what is wrong ends it with the error's own line, the last on stderr."""
    name, *arguments = sys.argv[1:]
    print(json.dumps(PROBES[name](*arguments)))
