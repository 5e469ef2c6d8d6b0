"""The DALI graph that carries a plan out: one decode per image, then per view resize, colour and blur.

The graph is the same on the GPU and on the CPU and holds no random operator: all parameters come in
through one external source. Regions of interest are arguments, so they stay on the CPU for both devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types

from .plan import ViewPlan
from .views import View

# Rows read ahead of the batch in hand. The graph computes one batch while the trainer works on another.
PREFETCH = 2
_INTERPOLATION = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}
_DTYPE = {"float32": types.FLOAT, "float16": types.FLOAT16}

Source = Callable[[], Sequence[NDArray[Any]]]


def build(
    views: Sequence[View],
    source: Source,
    *,
    batch_size: int,
    device: str,
    device_id: int | None,
    threads: int,
    encoded: bool,
    dtype: str,
    mean: Sequence[float],
    std: Sequence[float],
    hw_decoder_load: float,
) -> Pipeline:
    """Build the graph; `pipeline.run()` then returns one uniform (B, S, S, 3) batch per view.

    Args:
        views: the V views, which fix sizes, interpolation and which operators the graph needs at all.
        source: called once per batch; returns `inputs(...)`, or raises StopIteration at the end of an epoch.
        device: ``"gpu"`` (mixed decode) or ``"cpu"``; device_id: CUDA ordinal, None on the CPU.
        encoded: whether the source gives file names (uint8 rows, NUL-padded) or decoded (H, W, 3) images.
        dtype: ``"float32"`` or ``"float16"``; mean, std: of RGB in [0, 1].
    """
    gpu = device == "gpu"
    pipe = Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=PREFETCH, seed=0
    )
    partner = any(view.source == "partner" for view in views)
    with pipe:
        nodes = iter(_external(source, encoded, partner, views))
        images = {"self": _image(next(nodes), encoded, gpu, hw_decoder_load)}
        if partner:
            images["partner"] = _image(next(nodes), encoded, gpu, hw_decoder_load)
        outputs = []
        for view in views:
            image = _view(view, images[view.source], {name: next(nodes) for name in _parameters(view)})
            image = fn.crop_mirror_normalize(
                image,
                dtype=_DTYPE[dtype],
                output_layout="HWC",
                mean=[255.0 * m for m in mean],
                std=[255.0 * s for s in std],
            )
            outputs.append(image)
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
    names = ["start", "end"]
    if view.jitter > 0.0 or view.grayscale > 0.0:
        names += ["matrix", "pivot"]
    if view.blur > 0.0:
        names += ["sigma", "window"]
    if view.solarise > 0.0:
        names += ["solarise"]
    return names


def inputs(
    images: Sequence[NDArray[np.uint8]], views: Sequence[View], plans: Sequence[ViewPlan]
) -> list[NDArray[Any]]:
    """What the source returns for one batch: images of samples (and of partners), then each view's plan."""
    arrays: list[NDArray[Any]] = list(images)
    for view, drawn in zip(views, plans, strict=True):
        arrays += [getattr(drawn, name) for name in _parameters(view)]
    return arrays


def _external(source: Source, encoded: bool, partner: bool, views: Sequence[View]) -> list[Any]:
    """The source's nodes, in the order of `inputs`, with type and rank declared."""
    image = (types.UINT8, 1) if encoded else (types.UINT8, 3)
    kinds = [image] * (1 + partner) + [_KINDS[name] for view in views for name in _parameters(view)]
    return list(
        fn.external_source(
            source,
            num_outputs=len(kinds),
            batch=True,
            dtype=[k[0] for k in kinds],
            ndim=[k[1] for k in kinds],
        )
    )


def _image(node: Any, encoded: bool, gpu: bool, hw_decoder_load: float) -> Any:
    """Full RGB images of a batch, as stored: EXIF orientation is not applied, as in torchvision's loader."""
    if not encoded:
        images = fn.reshape(node, layout="HWC")
        return images.gpu() if gpu else images
    options: dict[str, Any] = {"device": "cpu"}
    if gpu:
        options = {"device": "mixed", "hw_decoder_load": hw_decoder_load}
    return fn.decoders.image(
        fn.io.file.read(node), output_type=types.RGB, adjust_orientation=False, **options
    )


def _view(view: View, image: Any, given: Mapping[str, Any]) -> Any:
    """Crop, resize and flip in one kernel, then the photometric operators this view can need, on uint8."""
    image = fn.resize(
        image,
        size=[view.size, view.size],
        roi_start=given["start"],
        roi_end=given["end"],
        interp_type=_INTERPOLATION[view.interpolation],
        antialias=True,
    )
    if "matrix" in given:
        shift = given["pivot"] * _grey_mean(image)
        image = fn.coord_transform(image, M=given["matrix"], T=shift, dtype=types.UINT8)
        image = fn.reshape(image, layout="HWC")
    if "sigma" in given:
        image = fn.gaussian_blur(image, sigma=given["sigma"], window_size=given["window"])
    if "solarise" in given:
        threshold = given["solarise"].gpu() if image.device == "gpu" else given["solarise"]
        # x ^ 255 is 255 - x.
        image = image ^ (fn.cast(image >= threshold, dtype=types.UINT8) * np.uint8(255))
    return image


def _grey_mean(image: Any) -> Any:
    """Mean grey value of each view, on the CPU because operators take per-sample arguments from there."""
    grey = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    return fn.reductions.mean(grey).cpu()


def default_threads(local_world: int = 1) -> int:
    """This process's share of the cores it may run on, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // local_world)


def decode_error(path: str, device: str, device_id: int | None) -> str | None:
    """Read and decode one file in a graph of its own: None if that works, else the reason in one line."""
    row = np.frombuffer(path.encode(), np.uint8)[None]
    probe = Pipeline(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1, seed=0)
    with probe:
        node = fn.external_source(lambda: row, batch=True, dtype=types.UINT8, ndim=1)
        probe.set_outputs(_image(node, True, device == "gpu", 0.0))
    try:
        probe.build()
        probe.run()
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        telling = [line for line in lines if "ailed" in line or "rror" in line]
        return (telling or lines or ["it cannot be decoded"])[0]
    return None
