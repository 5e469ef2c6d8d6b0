"""The DALI graph that carries a plan out: one decode per image, then per view resize, colour and blur.

The graph is the same on the GPU and on the CPU and holds no random operator: all parameters come in
through one external source. Regions of interest are arguments, so they stay on the CPU for both devices.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from ..data.headers import MAX_PIXELS
from ..data.source import Form
from ..plan.draw import ViewPlan
from ..plan.views import View
from ..system.machine import is_full
from . import colour as photometric

# Batches that are under way at a time. The graph computes one batch while the trainer works on another.
PREFETCH = 2
_INTERPOLATION = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}

Images: TypeAlias = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]
"""Names (B, P), B times encoded bytes (1-D) or pixels (B, H, W, 3): what `SampleIndex.inputs` gives."""
Inputs: TypeAlias = Callable[[], Sequence[Images | NDArray[Any]]]


def build(
    views: Sequence[View],
    source: Inputs,
    *,
    batch_size: int,
    device: str,
    device_id: int | None,
    threads: int,
    form: Form,
    dtype: str,
    mean: Sequence[float],
    std: Sequence[float],
    hw_decoder_load: float,
    fused: bool | None = None,
) -> Pipeline:
    """Build the graph; `pipeline.run()` then returns one uniform (B, S, S, 3) batch per view.

    Args:
        views: the V views, which fix sizes, interpolation and which operators the graph needs at all.
        source: called once per batch; returns `inputs(...)`, or raises StopIteration at the end of an epoch.
        device: ``"gpu"`` (mixed decode) or ``"cpu"``; device_id: CUDA ordinal, None on the CPU.
        form: whether the source gives images as names of files, as encoded bytes or as pixels; see `Images`.
        dtype: ``"float32"`` or ``"float16"``; mean, std: of RGB in [0, 1].
        fused: see `photometric.apply`; by default on the CPU.
    """
    fused = device == "cpu" if fused is None else fused
    mean, std = [255.0 * m for m in mean], [255.0 * s for s in std]
    pipe = Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=PREFETCH, seed=0
    )
    partner = any(view.source == "partner" for view in views)
    with pipe:
        nodes = iter(_external(source, form, partner, views))
        images = {}
        for name in ("self", "partner") if partner else ("self",):
            sizes = None if form == "pixels" else next(nodes)
            images[name] = _image(next(nodes), sizes, form, device, hw_decoder_load)
        outputs = []
        for view in views:
            given = {name: next(nodes) for name in _parameters(view)}
            image = _crop(view, images[view.source], given.pop("start"), given.pop("end"))
            outputs.append(
                photometric.apply(image, given, fused=fused, threads=threads, dtype=dtype, mean=mean, std=std)
            )
        pipe.set_outputs(*outputs)
    pipe.build()
    return pipe


# Type and rank, per sample, of what a ViewPlan holds.
_KINDS = {
    "start": (types.FLOAT, 1),
    "end": (types.FLOAT, 1),
    "matrix": (types.FLOAT, 2),
    "pivot": (types.FLOAT, 1),
    "sigma": (types.FLOAT, 0),
    "window": (types.INT32, 0),
    "solarise": (types.INT16, 0),
}


def _parameters(view: View) -> list[str]:
    """The parts of a ViewPlan that this view's operators read."""
    return ["start", "end", *photometric.parameters(view)]


def inputs(
    images: Sequence[Images],
    sizes: Sequence[NDArray[np.int32]],
    views: Sequence[View],
    plans: Sequence[ViewPlan],
) -> list[Images | NDArray[Any]]:
    """What the source returns for one batch.

    Args:
        images: of samples (and of partners); sizes: (B, 2) of what has to be decoded, none of pixels.
        plans: one of each view.
    """
    arrays: list[Images | NDArray[Any]] = []
    for number, each in enumerate(images):
        arrays += [*sizes[number : number + 1], each]
    for view, drawn in zip(views, plans, strict=True):
        arrays += [getattr(drawn, name) for name in _parameters(view)]
    return arrays


def _external(source: Inputs, form: Form, partner: bool, views: Sequence[View]) -> list[Any]:
    """The source's nodes, in the order of `inputs`, with type and rank declared."""
    image = (types.UINT8, 3 if form == "pixels" else 1)
    kinds = ([image] if form == "pixels" else [(types.INT32, 1), image]) * (1 + partner)
    kinds += [_KINDS[name] for view in views for name in _parameters(view)]
    return list(
        fn.external_source(
            source,
            num_outputs=len(kinds),
            batch=True,
            dtype=[k[0] for k in kinds],
            ndim=[k[1] for k in kinds],
        )
    )


def _image(node: Any, sizes: Any, form: Form, device: str, hw_decoder_load: float) -> Any:
    """Full RGB images of a batch, from their files or bytes, or as they are."""
    if form != "pixels":
        return decoded(read(node, form), device, hw_decoder_load, sizes)
    images = fn.reshape(node, layout="HWC")
    return images.gpu() if device == "gpu" else images


def decoded(encoded: Any, device: str, hw_decoder_load: float, sizes: Any = None) -> Any:
    """RGB images of encoded ones, as stored: EXIF orientation is not applied, as in torchvision's loader.

    An image that has not the height and width in `sizes`, if these are given, is an error of the batch: crops
    are drawn for these, and one that begins outside the image would read memory that is not its own.
    """
    options: dict[str, Any] = {"device": "cpu"}
    if device == "gpu":
        options = {"device": "mixed", "hw_decoder_load": hw_decoder_load}
    return fn.decoders.image(
        _fit_to_decode(encoded, sizes), output_type=types.RGB, adjust_orientation=False, **options
    )


def _fit_to_decode(encoded: Any, sizes: Any) -> Any:
    """The same bytes, or an error of the batch where a header cannot be parsed or states too many pixels, or
    others than `sizes`.

    DALI 2.4's decoder may crash the process on bytes that it cannot parse: it parses a batch on several
    threads, and its own share may throw while the others still write to its frame. So the headers are read
    before. And it asks for the memory of all stated pixels at once (30 GB for 100,000 x 100,000; on a GPU the
    pool keeps it). The index leaves out files of either kind, but one may change afterwards.
    """
    shape = fn.peek_image_shape(encoded, adjust_orientation=False)
    wrong = shape[0] * shape[1] > MAX_PIXELS
    if sizes is not None:
        wrong = wrong | (shape[0] != sizes[0]) | (shape[1] != sizes[1])
    # More than all of the bytes is an error.
    part = 1.0 + fn.cast(wrong, dtype=types.FLOAT)
    return fn.slice(encoded, rel_start=0.0, rel_shape=part, axes=[0], out_of_bounds_policy="error")


def read(node: Any, form: Form = "names") -> Any:
    """The encoded bytes of images, read if only names are given.

    To map files into memory is slow on network disks, and no faster on others.
    """
    return fn.io.file.read(node, dont_use_mmap=True) if form == "names" else node


def _crop(view: View, image: Any, start: Any, end: Any) -> Any:
    """Crop, resize and flip in one kernel."""
    return fn.resize(
        image,
        size=[view.size, view.size],
        roi_start=start,
        roi_end=end,
        interp_type=_INTERPOLATION[view.interpolation],
        antialias=True,
    )


def default_threads(local_world: int = 1) -> int:
    """This process's share of the cores it may run on, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // local_world)


def decoder(batch_size: int, threads: int, device: str, device_id: int | None, form: Form) -> Pipeline:
    """A graph that reads and decodes as the loader does: `run(images=...)` takes names or encoded bytes."""
    pipe = Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1, seed=0
    )
    with pipe:
        images = fn.external_source(name="images", batch=True, dtype=types.UINT8, ndim=1)
        pipe.set_outputs(decoded(read(images, form), device, 0.65 if batch_size > 1 else 0.0))
    pipe.build()
    return pipe


class Alone:
    """Decodes images one by one, to find those of a failed batch that the loader cannot decode."""

    def __init__(self, device: str, device_id: int | None) -> None:
        self._device = device, device_id
        self._graph: Pipeline | None = None

    def refusal(self, encoded: bytes) -> str:
        """What DALI says against an image, or "".

        Raises:
            RuntimeError: decoding fails for a cause that is not the image, such as a full memory of the GPU.
        """
        told = self._decode(encoded)
        if told and self._decode(_sound_image()):
            raise RuntimeError(
                f"The decoder refuses even a sound image ({told}), so no image is to blame; see what else "
                "runs on the device, and start again."
            )
        return told

    def _decode(self, encoded: bytes) -> str:
        self._graph = self._graph or decoder(1, 1, *self._device, "bytes")
        try:
            self._graph.run(images=[np.frombuffer(encoded, np.uint8)])
        except RuntimeError as error:
            self._graph = None  # a graph that failed may not be used again
            if is_full(error):
                raise
            return _reason(str(error))
        return ""


@cache
def _sound_image() -> bytes:
    """A small JPEG that any decoder takes."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    return file.getvalue()


def _reason(error: str) -> str:
    """The telling line of DALI's message: the first after its traceback, without where in DALI it arose."""
    lines = [line.strip() for line in error.partition("encountered:")[2].splitlines() if line.strip()]
    return lines[0] if lines else " ".join(error.split())
