"""Views of images for self-supervised learning, decoded and cut by DALI where a model says to look.

A model in training writes a box and a weight per sample into a `RegionTable`; a `ViewLoader` reads the
table once per epoch, draws the crops and lets a DALI graph decode each image once and cut all views.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import bad_list
    from .data.index import SampleIndex
    from .data.source import Source, SourceGoneError
    from .loader.batch import Batch
    from .loader.loader import ViewLoader
    from .loader.quarantine import BadImageError
    from .maps.heatmap import boxes_from_maps, heatmaps
    from .plan import recipes
    from .plan.views import View
    from .regions.table import RegionTable

__all__ = [
    "BadImageError",
    "Batch",
    "RegionTable",
    "SampleIndex",
    "Source",
    "SourceGoneError",
    "View",
    "ViewLoader",
    "bad_list",
    "boxes_from_maps",
    "heatmaps",
    "recipes",
]

_HOME = {
    "BadImageError": "loader.quarantine.BadImageError",
    "Batch": "loader.batch.Batch",
    "RegionTable": "regions.table.RegionTable",
    "SampleIndex": "data.index.SampleIndex",
    "Source": "data.source.Source",
    "SourceGoneError": "data.source.SourceGoneError",
    "View": "plan.views.View",
    "ViewLoader": "loader.loader.ViewLoader",
    "bad_list": "data.bad_list",
    "boxes_from_maps": "maps.heatmap.boxes_from_maps",
    "heatmaps": "maps.heatmap.heatmaps",
    "recipes": "plan.recipes",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: to index files need not wait for PyTorch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = f"{__name__}.{_HOME[name]}".rpartition(".")
    return getattr(import_module(module), attribute, None) or import_module(f"{module}.{attribute}")
