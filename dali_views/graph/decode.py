"""Decoding: from encoded bytes to RGB images, after a check of the headers.

The loader's graph decodes batches with these operators. `Alone` decodes single images with the same ones, to
find the unreadable images of a batch that failed.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from ..data.formats import MAX_PIXELS
from ..system.machine import full_memory

HW_DECODER_LOAD = 1.0
"""Share of a batch's JPEGs for the GPU's hardware decoder.

DALI's own default, 0.65, gives the first 65 % of a batch to the hardware and the others to CUDA, whose pixels
differ a little (DALI, pull requests 2232 and 4272): a view would depend on its place in the batch. With 1 or
0 the file alone decides; what the hardware does not take (progressive JPEGs, other formats) goes to CUDA.
"""


def decode(
    encoded: Any, device: str, hw_decoder_load: float, sizes: Any = None, usual: tuple[int, int] = (0, 0)
) -> Any:
    """RGB images as stored: EXIF orientation is not applied, as in torchvision's loader.

    An image whose height and width differ from `sizes`, if these are given, is an error of the batch. Crops
    were drawn for `sizes`: a crop that starts outside the image would read memory beyond it.

    The hardware decoder allocates memory for images of the height and width `usual` at the start, and more
    when larger ones come, which takes time.
    """
    options: dict[str, Any] = {"device": "cpu"}
    if device == "gpu":
        options = {"device": "mixed", "hw_decoder_load": hw_decoder_load}
        options |= {"preallocate_height_hint": usual[0], "preallocate_width_hint": usual[1]}
    checked = _check_headers(encoded, sizes)
    return fn.decoders.image(checked, output_type=types.RGB, adjust_orientation=False, **options)


def _check_headers(encoded: Any, sizes: Any) -> Any:
    """The same bytes, or an error of the batch if a header cannot be parsed, or states too many pixels or
    other sizes than `sizes`.

    DALI 2.4's decoder may crash the process on bytes that it cannot parse: it parses a batch on several
    threads, and one of them may raise while the others still write to its stack frame. It also allocates
    memory for all stated pixels at once (30 GB for 100,000 x 100,000; on a GPU the pool keeps it). The index
    leaves out such files, but a file may change afterwards.
    """
    shape = fn.peek_image_shape(encoded, adjust_orientation=False)
    wrong = shape[0] * shape[1] > MAX_PIXELS
    if sizes is not None:
        wrong = wrong | (shape[0] != sizes[0]) | (shape[1] != sizes[1])
    # A slice that reaches beyond the bytes is an error; DALI has no operator that just raises one.
    part = 1.0 + fn.cast(wrong, dtype=types.FLOAT)
    return fn.slice(encoded, rel_start=0.0, rel_shape=part, axes=[0], out_of_bounds_policy="error")


def decoder(
    batch_size: int, threads: int, device: str, device_id: int | None, load: float = HW_DECODER_LOAD
) -> Pipeline:
    """A graph that decodes as the loader does: `run(images=...)` takes encoded bytes; see `decode`."""
    pipe = Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1, seed=0
    )
    with pipe:
        images = fn.external_source(name="images", batch=True, dtype=types.UINT8, ndim=1)
        pipe.set_outputs(decode(images, device, load))
    pipe.build()
    return pipe


class Alone:
    """Decodes images one by one, each on the decoder that has it in a batch."""

    def __init__(self, device: str, device_id: int | None, hw_decoder_load: float = HW_DECODER_LOAD) -> None:
        self._device = device, device_id
        self._hw_decoder_load = hw_decoder_load
        self._graph: Pipeline | None = None

    def refusal(self, encoded: bytes) -> str:
        """DALI's reason why it cannot decode an image, or "".

        Raises:
            RuntimeError: decoding fails for another cause than the image, such as a full memory of the GPU.
        """
        refused = self._decode(encoded)
        if refused and self._decode(_sound_image()):
            raise RuntimeError(
                f"The decoder refuses even a sound image ({refused}), so the images are not the cause; check "
                "what else runs on the device, and start again."
            )
        return refused

    def _decode(self, encoded: bytes) -> str:
        self._graph = self._graph or decoder(1, 1, *self._device, self._hw_decoder_load)
        try:
            self._graph.run(images=[np.frombuffer(encoded, np.uint8)])
        except RuntimeError as error:
            self._graph = None  # a graph that failed may not be used again
            if full_memory(error):
                raise
            return _reason(str(error))
        return ""


@cache
def _sound_image() -> bytes:
    """A small JPEG that any decoder accepts."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    return file.getvalue()


def _reason(error: str) -> str:
    """The useful line of DALI's message: the first after its traceback."""
    lines = [line.strip() for line in error.partition("encountered:")[2].splitlines() if line.strip()]
    return lines[0] if lines else " ".join(error.split())
