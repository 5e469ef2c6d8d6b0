"""Pictures of what the loader does: each image with its box, heatmap and crops, beside its views."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from ..data.index import SampleIndex
from ..loader.batch import Batch
from ..loader.loader import IMAGENET_MEAN, IMAGENET_STD
from .pack.image import as_stored

BOX_COLOUR = "#ffffff"
CROP_COLOURS = (
    "#ff5a36",
    "#22a7f0",
    "#f7ca18",
    "#2ecc71",
    "#d45bff",
    "#00d0c4",
    "#ff8fb1",
    "#b8e986",
    "#c0a080",
    "#7f8cff",
)
_MOST_VIEWS = 10
_LONGEST_NAME = 28  # letters that fit above an image


def grid(
    index: SampleIndex,
    batch: Batch,
    *,
    heatmaps: NDArray[np.float32] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Figure:
    """One line per sample: the image with its semantic box (dashed) and every crop, the heatmap, the views.

    Args:
        batch: the samples to show, as the loader gave them.
        heatmaps: (B, h, w) in [0, 1] on the whole image, drawn over it if given.
        mean, std: the loader's normalisation, undone here.
    """
    views = batch.views[:_MOST_VIEWS]
    columns = 1 + (heatmaps is not None) + len(views)
    figure = Figure(figsize=(1.7 * columns, 1.85 * len(batch) + 0.25), dpi=100, layout="constrained")
    axes = figure.subplots(len(batch), columns, squeeze=False)
    pixels = [denormalise(view.float().cpu().numpy(), mean, std) for view in views]
    crops, flipped = batch.crops.cpu().numpy(), batch.flipped.cpu().numpy()
    boxes, weights = batch.boxes.cpu().numpy(), batch.weights.cpu().numpy()
    for row, sample in enumerate(batch.index.tolist()):
        line = list(axes[row])
        image = read_image(index, sample)
        height, width = image.shape[:2]
        line[0].imshow(image)
        for view in range(len(views)):
            _outline(line[0], crops[row, view], (height, width), CROP_COLOURS[view % len(CROP_COLOURS)], "-")
        _outline(line[0], boxes[row], (height, width), BOX_COLOUR, "--")
        name = Path(index.path(sample)).name
        told = name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"  # numbers come last
        line[0].set_title(f"{told}\nweight {weights[row]:.2f}", fontsize=7)
        if heatmaps is not None:
            line[1].imshow(image)
            line[1].imshow(
                heatmaps[row], extent=(0, width, height, 0), alpha=0.55, cmap="inferno", vmin=0, vmax=1
            )
            _outline(line[1], boxes[row], (height, width), BOX_COLOUR, "--")
            line[1].set_title("heatmap, box", fontsize=7)
        for view, axis in enumerate(line[-len(views) :]):
            axis.imshow(pixels[view][row])
            axis.set_title(f"view {view}" + (", flipped" if flipped[row, view] else ""), fontsize=7)
            for spine in axis.spines.values():
                spine.set(color=CROP_COLOURS[view % len(CROP_COLOURS)], linewidth=2.5)
        for axis in line:
            axis.set(xticks=[], yticks=[])
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG (or whatever the suffix says)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def as_array(figure: Figure) -> NDArray[np.uint8]:
    """The figure as (H, W, 3) pixels, for TensorBoard."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def read_image(index: SampleIndex, row: int) -> NDArray[np.uint8]:
    """The stored image as (H, W, 3); EXIF orientation is not applied, as in the loader."""
    if index.arrays is not None:
        return np.asarray(index.arrays[row])
    with Image.open(io.BytesIO(index.encoded(row))) as image:
        return np.asarray(as_stored(image)[0].convert("RGB"))


def denormalise(
    views: NDArray[np.float32], mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """(B, 3, S, S) normalised to (B, S, S, 3) in [0, 1]."""
    pixels = views.transpose(0, 2, 3, 1) * np.asarray(std, np.float32) + np.asarray(mean, np.float32)
    return pixels.clip(0.0, 1.0)


def _outline(axis: Axes, box: NDArray[np.float32], size: tuple[int, int], colour: str, style: str) -> None:
    y0, x0, y1, x1 = box * np.array([size[0], size[1], size[0], size[1]])
    patch = Rectangle(
        (x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linestyle=style, linewidth=1.6
    )
    axis.add_patch(patch)
