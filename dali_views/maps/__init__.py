"""Maps: what a model sees in an image.

tap          `FeatureTap`: the output of one layer of any model
heatmap      from features to heatmaps
boxes        from heatmaps to boxes: `boxes_from_maps` (one box), `regions_from_maps` (up to K boxes)
loss_weights the saliency of crops, and weights of losses
coordinates  boxes and maps between a view and its image
"""

from .boxes import boxes_from_maps, regions_from_maps
from .coordinates import boxes_to_image, boxes_to_view, iou, map_to_image, map_to_view
from .heatmap import gradient_map, heatmaps
from .loss_weights import crop_saliency, pair_weights
from .tap import FeatureTap

__all__ = [
    "FeatureTap",
    "boxes_from_maps",
    "boxes_to_image",
    "boxes_to_view",
    "crop_saliency",
    "gradient_map",
    "heatmaps",
    "iou",
    "map_to_image",
    "map_to_view",
    "pair_weights",
    "regions_from_maps",
]
