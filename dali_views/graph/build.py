"""The DALI graph that executes a plan: one decode per image, then resize, colour and blur per view.

The graph contains no random operator: all parameters enter through one external source. Rectangles are
operator arguments, so they stay on the CPU. On a CPU the graph decodes, and `views_cpu` makes the views.
DALI's operators run there, too, so that tests can compare the two.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, backend, fn, types

from ..data.source import Form
from ..plan.draw import ViewPlan
from ..plan.views import View
from . import colour
from .decode import decode
from .views_cpu import Views

PREFETCH = 2
"""Batches in progress: the graph computes one while the trainer works on another."""
_INTERPOLATION = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}
# Type and number of dimensions, per sample, of the parts of a ViewPlan.
_KINDS = {
    "start": (types.FLOAT, 1),
    "end": (types.FLOAT, 1),
    "axes": (types.FLOAT, 2),
    "shape": (types.FLOAT, 1),
    "matrix": (types.FLOAT, 2),
    "pivot": (types.FLOAT, 1),
    "sigma": (types.FLOAT, 0),
    "window": (types.INT32, 0),
    "solarise": (types.INT16, 0),
}

Images: TypeAlias = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]
"""B times encoded bytes (1-D), or pixels (B, H, W, 3): the result of `SampleIndex.inputs`."""
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
    usual: tuple[int, int] = (0, 0),
    maker: Views | None = None,
) -> Pipeline:
    """Build the graph; `pipeline.run()` then returns one uniform batch per view: (B, S, S, 3), or padded
    (B, H, W, 3), see `View.longest`. With a `maker`, that has them, and the result has no meaning.

    Args:
        views: the V views; they decide sizes, interpolation and which operators the graph contains.
        source: called once per batch; returns `inputs(...)`, or raises StopIteration at the end of an epoch.
        device: ``"gpu"`` (mixed decode) or ``"cpu"``; device_id: CUDA ordinal, None on the CPU.
        form: of the index: with "pixels" the source gives these, else encoded bytes; see `Images`.
        dtype: ``"float32"`` or ``"float16"``; mean, std: of RGB in [0, 1].
        hw_decoder_load, usual: see `decode`.
        maker: makes the views in place of DALI's operators; for ``"cpu"``. It was given the plans.
    """
    mean, std = [255.0 * m for m in mean], [255.0 * s for s in std]
    pipe = Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=PREFETCH, seed=0
    )
    partner = any(view.partner for view in views)
    with pipe:
        nodes = iter(_external(source, form, partner, [] if maker else views))
        images = []  # of the samples, and of their partners
        for _ in range(1 + partner):
            if form == "pixels":
                pixels = fn.reshape(next(nodes), layout="HWC")
                images.append(pixels.gpu() if device == "gpu" else pixels)
            else:
                sizes = next(nodes)
                images.append(decode(next(nodes), device, hw_decoder_load, sizes, usual))
        outputs = []
        if maker is not None:
            outputs = [fn.python_function(*images, function=maker, batch_processing=True)]
        for view in [] if maker else views:
            given = {name: next(nodes) for name in _parameters(view)}
            image = fn.resize(  # which also crops and mirrors, in one kernel
                images[view.partner],
                size=given.pop("shape", [view.size, view.size]),
                roi_start=given.pop("start"),
                roi_end=given.pop("end"),
                interp_type=_INTERPOLATION[view.interpolation],
                antialias=True,
            )
            if view.rotate90 > 0.0:
                # One operator for all samples: no operator of DALI transposes some of them. No pixel changes.
                image = fn.warp_affine(
                    image, matrix=given.pop("axes"), size=[view.size] * 2, interp_type=types.INTERP_NN
                )
            image = colour.apply(image, given, dtype=dtype, mean=mean, std=std)
            # Strides of detectors are powers of two up to 32 (torchvision's own transform pads so, too).
            outputs.append(image if view.longest is None else fn.pad(image, axes=(0, 1), align=[32, 32]))
        pipe.set_outputs(*outputs)
    check_threads(2 * threads + 8)
    pipe.build()
    return pipe


def check_threads(count: int) -> None:
    """A RuntimeError if the system does not start so many threads at once.

    DALI makes a pool for the graph, one for the decoder and a few threads more. If one does not start, for
    want of address space (`ulimit -v`) or of processes, those before it end this process without a word.
    """
    over, started = threading.Event(), []
    try:
        for _ in range(count):
            started.append(threading.Thread(target=over.wait, daemon=True))
            started[-1].start()
    except RuntimeError as error:  # "can't start new thread"
        started.pop()
        raise RuntimeError(f"{error} beside {len(started)} others of {count}") from error
    finally:
        over.set()
        for thread in started:
            thread.join()


def inputs(
    images: Sequence[Images],
    sizes: Sequence[NDArray[np.int32]],
    views: Sequence[View] = (),
    plans: Sequence[ViewPlan] = (),
) -> list[Images | NDArray[Any]]:
    """What the source returns for one batch.

    Args:
        images: of samples (and of partners); sizes: (B, 2) of each of these; empty for pixels.
        plans: one per view that the graph makes.
    """
    arrays: list[Images | NDArray[Any]] = []
    for number, each in enumerate(images):
        arrays += [*sizes[number : number + 1], each]
    for view, drawn in zip(views, plans, strict=True):
        arrays += [getattr(drawn, name) for name in _parameters(view)]
    return arrays


def _external(source: Inputs, form: Form, partner: bool, views: Sequence[View]) -> list[Any]:
    """The source's nodes, in the order of `inputs`, with type and dimensions declared."""
    image = (types.UINT8, 3 if form == "pixels" else 1)
    kinds = ([image] if form == "pixels" else [(types.INT32, 1), image]) * (1 + partner)
    kinds += [_KINDS[name] for view in views for name in _parameters(view)]
    dtypes, dimensions = [kind[0] for kind in kinds], [kind[1] for kind in kinds]
    return list(fn.external_source(source, num_outputs=len(kinds), batch=True, dtype=dtypes, ndim=dimensions))


def _parameters(view: View) -> list[str]:
    """The parts of a ViewPlan that this view's operators read."""
    placed = [*["axes"] * (view.rotate90 > 0.0), *["shape"] * (view.longest is not None)]
    return ["start", "end", *placed, *colour.parameters(view)]


def release_memory(device: str) -> None:
    """Return the memory that no graph uses, on the GPU and pinned on the host; nothing for ``"cpu"``.

    DALI keeps what it ever took: what a pass over larger images or batches took would be lost to training.
    """
    if device == "gpu":
        backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]  # of a compiled module


def default_threads() -> int:
    """This process's share of the cores that it may use, at least one; torchrun's ranks share them."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
