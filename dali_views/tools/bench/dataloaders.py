"""PyTorch's DataLoader with the transforms of torchvision, albumentations and lightly."""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import RandomResizedCrop, v2

from ...loader.loader import IMAGENET_MEAN, IMAGENET_STD
from ...plan.views import View
from .contest import Batches, Setup

Transform: TypeAlias = Any  # Callable[[image], image]; the libraries' own have no types
Use: TypeAlias = Callable[
    [list[Tensor]], None
]  # what is done with the views of a batch, such as a training step

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or every process queries the network for a newer one


class Views(torch.utils.data.Dataset[list[Any]]):
    """The data set that most users write: open a file, apply one transform per view."""

    def __init__(self, setup: Setup, opened: Transform, transforms: Sequence[Transform]) -> None:
        self.index, self.opened, self.transforms = setup.index, opened, transforms

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> list[Any]:
        files = self.index.form == "names"
        image = self.opened(self.index.path(row) if files else io.BytesIO(self.index.encoded(row)))
        return [transform(image) for transform in self.transforms]


def ignore(views: list[Tensor]) -> None:
    """Views that nobody uses."""


def batches(
    setup: Setup,
    opened: Transform,
    transform: Callable[[View], Transform],
    use: Use = ignore,
    **options: Any,
) -> Batches:
    """Batches of `loaded`, with views on the host."""
    for views in loaded(setup, opened, transform, **options):
        use(views)
        yield setup.batch_size


def loaded(
    setup: Setup, opened: Transform, transform: Callable[[View], Transform], **options: Any
) -> Iterator[list[Any]]:
    """Batches of a DataLoader as users build it, with the views that `transform` makes; endless."""
    loader = torch.utils.data.DataLoader(
        Views(setup, opened, [transform(view) for view in setup.views]),
        batch_size=setup.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=setup.workers,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="forkserver",  # to fork a process in which DALI has threads crashes
        **options,
    )
    while True:
        yield from loader


def endless_rows(setup: Setup) -> Iterator[int]:
    """Every row once, in another order each time round."""
    draw = np.random.default_rng(setup.seed)
    while True:
        yield from draw.permutation(len(setup.index)).tolist()


def pil_image(file: str | IO[bytes]) -> Image.Image:
    """The image in RGB."""
    return Image.open(file).convert("RGB")


def tensor_image(path: str) -> Tensor:
    """uint8 (3, H, W); PIL opens the formats that torchvision cannot decode."""
    try:
        image: Tensor = decode_image(path, ImageReadMode.RGB)
    except RuntimeError:
        image = v2.functional.pil_to_tensor(pil_image(path))
    return image


def pil_view(view: View, boxed: bool = False) -> Transform:
    """A random, whole or central view of a PIL image as in MoCo's code; `boxed`: as ContrastiveCrop crops."""
    crop = partial(boxed_crop, view) if boxed else cut(view)
    return v2.Compose([crop, *photometric(view, partial(pil_blur, view.sigma))])


def tensor_view(view: View) -> Transform:
    """A view of a uint8 tensor."""
    return v2.Compose([cut(view), *photometric(view, v2.GaussianBlur(window(view), view.sigma))])


def cut(view: View) -> Any:
    """From an image to the square."""
    size, how = [view.size, view.size], interpolation(view)
    if view.crop == "whole":
        return v2.Resize(size, how)
    if view.crop == "centre":
        return v2.Compose([v2.Resize(round(view.size / view.centre_share), how), v2.CenterCrop(view.size)])
    return v2.RandomResizedCrop(size, view.scale, view.ratio, how)


def boxed_crop(view: View, image: Image.Image, box: Sequence[float] = (0.2, 0.3, 0.7, 0.8)) -> Image.Image:
    """A crop whose centre lies in a box (y0, x0, y1, x1), by Beta(alpha, alpha), after arXiv 2202.03278."""
    _, _, *parts = RandomResizedCrop.get_params(image, list(view.scale), list(view.ratio))
    starts = []
    for axis, whole in enumerate((image.height, image.width)):
        ends = [int(whole * end) - parts[axis] // 2 for end in box[axis::2]]
        first, last = np.clip(ends, 0, whole - parts[axis])
        starts.append(int(first + (last - first) * random.betavariate(view.alpha, view.alpha)))
    size, how = [view.size] * 2, interpolation(view)
    crop: Image.Image = v2.functional.resized_crop(image, *starts, *parts, size, how)
    return crop


def interpolation(view: View) -> Any:
    """torchvision's name for the view's interpolation."""
    return v2.InterpolationMode.BICUBIC if view.interpolation == "cubic" else v2.InterpolationMode.BILINEAR


def photometric(view: View, blur: Transform) -> list[Transform]:
    """Flip, colour and normalisation, from a PIL image or uint8 tensor to a float32 tensor."""
    jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    return present(
        (view.flip, v2.RandomHorizontalFlip(view.flip)),
        (view.jitter, v2.RandomApply([jitter], view.jitter)),
        (view.grayscale, v2.RandomGrayscale(view.grayscale)),
        (view.blur, v2.RandomApply([blur], view.blur)),
        (view.solarise, v2.RandomSolarize(128, view.solarise)),
        (1, v2.ToImage()),
        (1, v2.ToDtype(torch.float32, scale=True)),
        (1, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)),
        (1, v2.ToPureTensor()),
    )


def present(*steps: tuple[float, Any]) -> list[Any]:
    """The steps whose probability is not 0."""
    return [step for probability, step in steps if probability]


def pil_blur(sigma: tuple[float, float], image: Image.Image) -> Image.Image:
    """Blur with a random radius; PIL approximates the Gaussian by three boxes."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*sigma)))


def window(view: View) -> int:
    """Pixels of torchvision's blur kernel, which is fixed: room for the widest blur."""
    return 2 * math.ceil(3 * view.sigma[1]) + 1


def cv2_image(path: str) -> NDArray[np.uint8]:
    """(H, W, 3) in RGB; PIL opens what OpenCV cannot."""
    import cv2

    image = cv2.imread(path, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return np.asarray(pil_image(path) if image is None else image)


def one_thread(worker: int) -> None:
    """Starts a worker process with one thread of OpenCV, as lightly-train does."""
    import cv2

    cv2.setNumThreads(0)


def albumented(view: View) -> Transform:
    """A view by albumentations, from pixels to a normalised tensor."""
    import albumentations as A
    import cv2
    from albumentations.pytorch import ToTensorV2

    size, area = (view.size, view.size), cv2.INTER_AREA
    colours = (view.brightness, view.contrast, view.saturation, view.hue)
    steps = present(
        (1, A.RandomResizedCrop(size, scale=view.scale, ratio=view.ratio, interpolation=area)),
        (view.flip, A.HorizontalFlip(p=view.flip)),
        (view.jitter, A.ColorJitter(*colours, p=view.jitter)),
        (view.grayscale, A.ToGray(p=view.grayscale)),
        (view.blur, A.GaussianBlur(blur_limit=0, sigma_limit=view.sigma, p=view.blur)),
        (view.solarise, A.Solarize(threshold_range=(0.5, 0.5), p=view.solarise)),
        (1, A.Normalize(IMAGENET_MEAN, IMAGENET_STD)),
        (1, ToTensorV2()),
    )
    return partial(_image_of, A.Compose(steps))


def _image_of(composed: Callable[..., Any], image: NDArray[np.uint8]) -> Any:
    return composed(image=image)["image"]


def lightly_pair(view: View) -> Transform:
    """lightly's transform for MoCo v2, which makes both views at once."""
    from lightly.transforms import MoCoV2Transform

    return MoCoV2Transform(view.size)
