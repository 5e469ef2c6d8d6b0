"""The saliency of crops, and weights of losses that grow with it.

"Saliency Guided Contrastive Learning on Scene Images" (arXiv 2302.11461) crops salient regions as positive
pairs and weights the losses of crops by saliency, with a map from the model's own output. Its formulas are
not published; the ones here are our design.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .coordinates import map_to_view

LOWEST_TEMPERATURE = 0.002
"""For `pair_weights`: the weight of a sample of score 0, exp(-1 / T), is still a float64 above 0."""

_GRID = (7, 7)  # samples per crop: the cells of a ResNet's last map of a 224-pixel image


def crop_saliency(maps: Tensor, crops: Tensor, flipped: Tensor) -> Tensor:
    """Mean (B,) of a map inside a crop, from samples on a grid of 7 x 7; does not wait for the device.

    Args:
        maps: (B, h, w) in [0, 1] on the image.
        crops, flipped: (B, 4) and (B,) of one view, see ``boxes_to_view``. A rotation does not change a mean.
    """
    return map_to_view(maps, crops, flipped, _GRID).mean((1, 2))


def pair_weights(
    scores: Tensor, temperature: float, mean: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Weights (B,) of losses, float32, that grow with the saliency of the compared views; no gradient.

    w = exp(s / T) divided by its mean over the batches of all ranks, where s is the product of a sample's
    scores. So the mean weight is 1, and an infinite temperature gives each sample exactly 1.

    Args:
        scores: (B, V), saliency of the V views in [0, 1] (values outside are clipped), or their product (B,).
        temperature: T, at least ``LOWEST_TEMPERATURE``; ``math.inf`` is allowed.
        mean: averages a tensor over all ranks, whose batches have equal sizes; None for one process.

    Raises:
        ValueError: a temperature that is too low, or scores of another shape.
    """
    if not temperature >= LOWEST_TEMPERATURE:
        raise ValueError(
            f"temperature {temperature} leaves all weight to single samples; give at least "
            f"{LOWEST_TEMPERATURE}, or inf for equal weights."
        )
    if scores.ndim not in (1, 2):
        raise ValueError(f"scores have shape {tuple(scores.shape)}; give (B, V), or (B,).")
    scores = scores.detach().double().clamp(0, 1)
    pairs = scores.prod(1) if scores.ndim == 2 else scores
    # Minus 1, the greatest possible score: the greatest score of all ranks is not known here.
    powers = ((pairs - 1) / temperature).exp()
    average = powers.mean()
    return (powers / (average if mean is None else mean(average))).float()
