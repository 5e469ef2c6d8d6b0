"""Maps: what a model sees in an image, as heatmaps, boxes and weights."""

from .coordinates import boxes_to_image, boxes_to_view, iou, map_to_image, map_to_view
from .heatmap import boxes_from_maps, heatmaps
from .tap import FeatureTap
from .weights import crop_saliency, pair_weights, regions_from_maps

__all__ = [
    "FeatureTap",
    "boxes_from_maps",
    "boxes_to_image",
    "boxes_to_view",
    "crop_saliency",
    "heatmaps",
    "iou",
    "map_to_image",
    "map_to_view",
    "pair_weights",
    "regions_from_maps",
]
